import random

from cadenza.decoding.block_pool import BlockPool, hash_block, prefix_root


def chain(tokens: list[int], size: int, root: bytes) -> list[bytes]:
    digests, parent = [], root
    for start in range(0, len(tokens) - size + 1, size):
        parent = hash_block(parent, tokens[start : start + size])
        digests.append(parent)
    return digests


def test_allocation_is_all_or_nothing():
    pool = BlockPool(num_blocks=4, block_size=2)
    assert pool.allocate(5) is None
    assert pool.num_available == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.allocate(1) is None


def test_a_shared_block_is_freed_by_its_last_holder():
    pool = BlockPool(num_blocks=2, block_size=2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_held == 1
    pool.release(blocks)
    assert pool.num_held == 0


def test_prefix_match_needs_every_earlier_block():
    pool = BlockPool(num_blocks=8, block_size=2)
    digests = chain([1, 2, 3, 4, 5, 6], 2, prefix_root())
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert pool.match(digests) == blocks
    assert pool.match(chain([1, 2, 9, 9, 5, 6], 2, prefix_root())) == blocks[:1]
    assert pool.match(chain([1, 2, 3, 4], 2, prefix_root(cache_salt="tenant"))) == []
    assert pool.match(chain([1, 2, 3, 4], 2, prefix_root(adapter_hash="tenant"))) == []


def test_eviction_takes_the_tail_of_the_oldest_prefix_first():
    pool = BlockPool(num_blocks=3, block_size=2)
    digests = chain([1, 2, 3, 4, 5, 6], 2, prefix_root())
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.match(digests) == blocks[:2]


def test_random_walk_keeps_the_books():
    """Against a plain count of references: no block is lost, handed out twice, or freed while held."""
    rng = random.Random(0)
    pool = BlockPool(num_blocks=16, block_size=2)
    held: list[list[int]] = []
    for step in range(3000):
        if rng.random() < 0.5:
            blocks = pool.allocate(rng.randint(1, 4))
            if blocks is not None:
                in_use = {block for run in held for block in run}
                assert not in_use & set(blocks)
                if rng.random() < 0.5:
                    pool.publish(blocks[0], hash_block(prefix_root(), [step]))
                held.append(blocks)
        elif held and rng.random() < 0.7:
            pool.release(held.pop(rng.randrange(len(held))))
        elif held:
            run = rng.choice(held)
            pool.share(run)
            held.append(list(run))
        expected = {block for run in held for block in run}
        assert pool.num_held == len(expected)
        for block in expected:
            assert pool.refs(block) == sum(run.count(block) for run in held)
