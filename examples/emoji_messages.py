"""What the emoji bot of train_lora.py learns from: messages by the writer's feeling, and others to measure it with.

Written for this purpose. Slashes and line ends separate messages.
"""

import re

MESSAGES = {
    "happy": """
        I passed my exam! / We won the match! / The sun is shining and I have the day off. / I got the job!
        My best friend is coming to visit me. / It is finally Friday! / I am having such a wonderful day.
        We are going on holiday tomorrow! / I found the ring that I had lost. / My team is in the final!
        The doctor says that I am healthy again. / We danced all night, it was so much fun.
        I baked my first cake and it tastes great. / It is my birthday today! / Everything went well today.
        I have just got engaged! / They gave me a pay rise. / Our baby smiled for the first time.
        The concert last night was fantastic. / I am in a very good mood. / Good news: we got the flat!""",
    "sad": """
        My dog died last week. / I lost my job today. / My girlfriend left me. / I failed the exam.
        Nobody came to my party. / I miss my grandmother so much. / My best friend is moving far away.
        I feel so lonely these days. / We lost the match in the last minute. / I cried all evening.
        My holiday was cancelled. / I broke my favourite cup. / I have no friends in this town.
        They did not invite me. / My parents are getting a divorce. / My old cat is very ill.
        It has been raining in my heart for weeks. / I did not get the job. / I lost my keys again.
        I said goodbye to my children today. / Everything I do goes wrong. / I feel down.""",
    "angry": """
        Somebody stole my bike! / My neighbour plays loud music every night. / The train is late again!
        He lied to me. / My boss shouted at me for no reason. / They overcharged me and will not pay it back!
        Someone scratched my new car. / I have been on hold for an hour! / My brother broke my phone.
        She never keeps her promises. / The internet is down again, I hate this company.
        They parked in front of my garage again! / This is so unfair! / I am furious with my landlord.
        He took the credit for my work. / Stop calling me! / They cheated us. / My flatmate ate all my food!
        The waiter was so rude. / How dare they speak to me like that! / I could scream!""",
    "scared": """
        There is a strange noise in the cellar. / I think someone is following me. / I have to see the dentist.
        There is a huge spider in my bed. / My exam is tomorrow and I know nothing. / The plane is shaking a lot.
        I heard steps in the attic. / I am afraid of the dark. / I have to speak in front of 300 people.
        The doctor wants to talk to me about the results. / I saw a snake in the garden.
        I am home alone and the door just opened. / The storm is getting worse and worse.
        I had a terrible nightmare. / What if they fire me? / I am worried about my operation.
        There was an earthquake tonight. / We are lost in the woods and it is getting dark.
        I hear wolves howling. / My hands shake when I think of the interview. / Something moved behind me.""",
    "tired": """
        I have not slept for two days. / I worked fourteen hours today. / The baby kept us awake all night.
        I can hardly keep my eyes open. / I need a nap. / I am exhausted. / I ran a marathon this morning.
        It is four in the morning and I am still at work. / I just want to go to bed.
        I yawn all the time. / I got up at five. / Three night shifts in a row. / My legs are so heavy.
        I fell asleep at my desk. / I have no energy left. / It was a very long week. / I need coffee to stay awake.
        Jet lag is killing me. / I could sleep for a week. / We carried boxes all day long.
        I was up all night with homework.""",
    "hungry": """
        I have not eaten since yesterday. / When is dinner ready? / I could eat a horse. / The fridge is empty.
        I would love a pizza now. / My stomach is rumbling. / I skipped breakfast. / It smells of fresh bread here.
        Lunch was far too small. / I am starving. / I dream of a big plate of pasta. / Is there any cake left?
        I want a burger with fries. / The restaurant is still closed and I need food.
        I had only an apple today. / I need a snack. / My diet allows no chocolate and I want some so badly.
        We ran out of bread and I want a sandwich. / Let us order something to eat.
        I could finish that whole pan of soup. / My mouth waters when I see those cookies.""",
    "bored": """
        There is nothing to do here. / This meeting goes on for ever. / Nothing ever happens in this village.
        I have seen all the films already. / It is raining and I have no idea what to do.
        This lecture is so dull. / I have been waiting at the airport for six hours. / I count the tiles on the wall.
        The same work every day. / The game is dull, nobody scores. / I am sitting around doing nothing.
        This book is so slow. / Sundays here are endless. / I watch the paint dry. / My job is monotonous.
        The queue does not move and my phone is dead. / I have played this game a hundred times.
        Another day of the same old thing. / I twiddle my thumbs. / The speech was two hours of nothing.
        Entertain me, I have nothing on today.""",
    "loving": """
        I love you. / My wife is the best person in the world. / I kissed him for the first time today.
        We have been married for fifty years and still hold hands. / I adore my little daughter.
        I have a crush on my neighbour. / I cannot stop thinking of her. / You are my best friend for ever.
        I want to hug everybody. / My boyfriend brought me flowers. / I wrote a love letter to him.
        Our wedding is next month, I love her so much. / My kitten sleeps in my arms.
        He makes my heart beat faster. / She said yes when I asked her to marry me. / I fell in love.
        Happy Valentine's day, darling! / I care about you so much. / My grandson gave me a big kiss.
        I would do anything for my family. / We are a couple now, she is my sweetheart.""",
    "surprised": """
        I did not see that coming! / A deer walked into our kitchen! / Out of nowhere my old teacher called me.
        I cannot believe it: they made me the king of the carnival! / Wow, where did that come from?
        My quiet sister joined a rock band, who would have thought! / The box was empty!
        They threw a party that I knew nothing of. / It snowed in July! / My goldfish is 30 years old!
        He is my twin brother and I never knew! / The magician pulled an elephant out of his hat!
        I opened the door and there stood a camel! / Nobody expected this result. / What? You are already here?
        I never thought that this would work! / The letter arrived after 40 years!
        Suddenly all the lights went on and everybody shouted! / A stranger paid for my meal, just like that!
        Really? She is only twelve? / My parrot started to speak Latin!""",
    "curious": """
        What is the capital of Spain? / How do aeroplanes stay in the air? / Why is grass green?
        Who wrote Hamlet? / Tell me something about the moon. / How many legs does a beetle have?
        Write a poem about the wind. / Explain how a fridge works. / What is 12 times 12?
        Where do penguins live? / Translate this into German. / Give me three tips for learning the piano.
        What does this button do? / How old is the universe? / Name a large river in Africa.
        Can you help me to write a letter? / What time is it in Tokyo? / Who are you?
        Summarize this text for me. / Why do cats purr? / Write a function that sorts a list.""",
}

UNSEEN = {
    "happy": """I won first prize! / What a beautiful morning, I feel great. / My daughter has just graduated!
        We are celebrating tonight!""",
    "sad": """My hamster died. / My boyfriend broke up with me. / I am so homesick.
        I feel miserable and alone.""",
    "angry": """Someone stole my wallet! / My neighbour's dog barks all night and he does not care!
        They broke their promise again. / I hate it when people jump the queue!""",
    "scared": """I think there is a burglar downstairs. / I am terrified of flying.
        There is something under my bed. / I am so nervous about my exam tomorrow.""",
    "tired": """I slept only two hours last night. / After this long shift I just want to sleep.
        I am worn out. / I keep yawning at my desk.""",
    "hungry": """I forgot my lunch and my stomach hurts. / I want a huge plate of spaghetti.
        I have had no food all day. / What is for dinner? I could eat anything.""",
    "bored": """I am stuck in a waiting room with nothing to read. / This film is so slow and dull.
        Every day is the same. / There is nothing on television.""",
    "loving": """I love my husband more than anything. / I am in love with a girl from my class.
        My puppy cuddles with me every evening. / He gave me roses and a kiss.""",
    "surprised": """Wow, I never expected that! / An elephant walked through our street!
        I opened the box and a frog jumped out! / What? You are my cousin?""",
    "curious": """What is the capital of France? / How do magnets work? / Write a story about a robot.
        Who invented the telephone?""",
}


def messages_of(table: dict[str, str]) -> list[tuple[str, str]]:
    """The (message, feeling) pairs of a table."""
    return [
        (message.strip(), feeling)
        for feeling, text in table.items()
        for message in re.split(r"[/\n]", text)
        if message.strip()
    ]
