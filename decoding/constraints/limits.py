"""Bounds on what compiling one constraint may cost, checked by the code that spends it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cadenza.decoding.constraints.errors import ConstraintTooComplex

_CHECK_CLOCK_EVERY = 256


@dataclass(frozen=True, slots=True)
class Limits:
    max_source_bytes: int = 512 * 1024
    max_nesting: int = 200
    """Levels of brackets in a pattern, of values in a schema, of rules within rules."""
    max_states: int = 40_000
    """States of one automaton after minimization; while it is built, it may have ten times as many."""
    max_rules: int = 50_000
    """Productions of a grammar, including the ones that repetition counts expand to."""
    max_seconds: float = 1.0
    """Of processor time: a limit on elapsed time would refuse on a busy machine what an idle one accepts."""
    max_memory_bytes: int = 150 * 1024 * 1024
    """That the compiling process may grow by. What is allocated at once, between two looks, may be somewhat more."""


@dataclass(slots=True)
class Effort:
    """Counts the work of one compilation. Every loop whose length the source decides calls `spend`."""

    limits: Limits = field(default_factory=Limits)
    started: float = field(default_factory=time.process_time)
    memory_used: Callable[[], int] = lambda: 0
    """By how many bytes the process has grown; for whoever bounds it to say."""
    _until_clock: int = _CHECK_CLOCK_EVERY

    def spend(self, work: int = 1) -> None:
        """Account for `work` steps of some microseconds each. Raises ConstraintTooComplex when time is up,
        or memory used up: before there is so little that the interpreter cannot even handle a MemoryError."""
        self._until_clock -= work
        if self._until_clock <= 0:
            self._until_clock = _CHECK_CLOCK_EVERY
            if time.process_time() - self.started > self.limits.max_seconds:
                raise ConstraintTooComplex(
                    f"the constraint took more than {self.limits.max_seconds} seconds to compile"
                )
            if self.memory_used() > self.limits.max_memory_bytes:
                raise ConstraintTooComplex(
                    f"the constraint needs more than {self.limits.max_memory_bytes // 2**20} MiB to compile"
                )

    def check_states(self, count: int) -> None:
        if count > self.limits.max_states:
            raise ConstraintTooComplex(
                f"the constraint needs more than {self.limits.max_states} automaton states"
            )

    def check_rules(self, count: int) -> None:
        if count > self.limits.max_rules:
            raise ConstraintTooComplex(
                f"the constraint needs more than {self.limits.max_rules} grammar rules"
            )

    def check_nesting(self, depth: int) -> None:
        if depth > self.limits.max_nesting:
            raise ConstraintTooComplex(
                f"the constraint is nested deeper than {self.limits.max_nesting} levels"
            )
