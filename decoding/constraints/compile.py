"""From a specification to what matchers are made of. Runs in the worker process; bounded by `Effort`."""

import json
from typing import Any

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import EPSILON, Expression
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.compiled import Compiled, CompiledContextFree, CompiledFinite
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.compiled import compile_grammar
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_grammar import to_llguidance
from cadenza.decoding.constraints.llguidance_masks import check_llguidance
from cadenza.decoding.constraints.schema import SchemaOptions, check_strict, schema_grammar
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.syntax import choice_expression, grammar_from_text, structural_tag_grammar
from cadenza.decoding.constraints.token_automaton import compile_finite
from cadenza.decoding.constraints.vocabulary import Vocabulary


def compile_spec(spec: ConstraintSpec, vocabulary: Vocabulary, effort: Effort) -> Compiled:
    """Raises ConstraintError: malformed, unsatisfiable, not enforceable, or over a limit."""
    texts = (spec.source, spec.whitespace_pattern or "")
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > effort.limits.max_source_bytes:
        raise ConstraintTooComplex(
            f"the constraint has {size} bytes, more than the limit of {effort.limits.max_source_bytes}"
        )
    try:
        if spec.kind == "regex":
            return _finite(parse_regex(spec.source, "python", effort), vocabulary, effort)
        if spec.kind == "choice":
            return _finite(choice_expression(json.loads(spec.source), effort), vocabulary, effort)
        return _context_free(_grammar(spec, effort), vocabulary, effort)
    except RecursionError:
        raise ConstraintTooComplex("the constraint is nested too deeply") from None


def _finite(expression: Expression, vocabulary: Vocabulary, effort: Effort) -> CompiledFinite:
    dfa = to_dfa(expression, effort)
    if dfa.is_empty:
        raise ConstraintError("no text satisfies the constraint")
    automaton = compile_finite(dfa, vocabulary, effort)
    return CompiledFinite(automaton, int(automaton.distance[0]))


def _context_free(grammar: Grammar, vocabulary: Vocabulary, effort: Effort) -> CompiledContextFree:
    if not vocabulary.eos_ids:
        raise ConstraintError("the model has no token that ends an answer")
    compiled = compile_grammar(grammar, effort)
    text = to_llguidance(grammar, effort)
    check_llguidance(text)
    shortest = vocabulary.segment(Parser(compiled).completion())
    if shortest is None:
        raise ConstraintError("the model's vocabulary cannot spell the constraint's shortest text")
    closing = {
        terminal.best_byte[state]
        for terminal in compiled.terminals
        for state, is_end in enumerate(terminal.accepting)
        if not is_end
    }
    return CompiledContextFree(compiled, text, len(shortest), vocabulary.spells(closing))


def _grammar(spec: ConstraintSpec, effort: Effort) -> Grammar:
    match spec.kind:
        case "grammar":
            return grammar_from_text(spec.source, effort)
        case "structural_tag":
            return structural_tag_grammar(_parsed(spec), effort, _schema_options(spec, effort))
        case "json_object":
            return schema_grammar({"type": "object"}, _schema_options(spec, effort), effort)
        case _:
            schema = _parsed(spec)
            if spec.strict:
                check_strict(schema, spec.name or "")
            return schema_grammar(schema, _schema_options(spec, effort), effort)


def _parsed(spec: ConstraintSpec) -> Any:
    try:
        return json.loads(spec.source)
    except ValueError as error:
        raise ConstraintError(f"the constraint is not JSON: {error}") from None


def _schema_options(spec: ConstraintSpec, effort: Effort) -> SchemaOptions:
    options: dict[str, Any] = {}
    if spec.whitespace_pattern is not None:
        try:
            options["whitespace"] = parse_regex(spec.whitespace_pattern, "python", effort)
        except ConstraintError as error:
            raise type(error)(f"whitespace_pattern: {error}") from None
    elif not spec.any_whitespace:
        options["whitespace"] = EPSILON
    if spec.additional_properties is not None:
        options["additional_properties"] = spec.additional_properties
    return SchemaOptions(**options)
