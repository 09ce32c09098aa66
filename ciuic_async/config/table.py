"""Every option that can be given outside the code: one table. ``docs/configuration.md`` shows it.

The defaults are those of the signatures; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ciuic_async.config import kinds
from ciuic_async.config.kinds import Kind

PREFIX = "CIUIC_"
CHECKPOINTER, CHAIN, SAVE = "Checkpointer", "SnapshotChain", "save"
BOTH = (CHECKPOINTER, SAVE)


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: the keyword argument, and the key in a file; ``trust.policy`` stands in the table ``trust``.
        default: of the keyword argument.
        unit: of a bare number.
        readers: which calls take it.
        none_is_unset: the keyword argument None means "not given" and leaves the choice to what stands here.
    """

    name: str
    kind: Kind
    default: object
    help: str
    unit: str = ""
    readers: tuple[str, ...] = (CHECKPOINTER,)
    none_is_unset: bool = False

    @property
    def environment(self) -> str:
        """Its variable."""
        return PREFIX + self.name.upper().replace(".", "_")


OPTIONS = (
    Option("every_steps", kinds.COUNT, None, "a snapshot every so many steps", "steps"),
    Option("every_epochs", kinds.COUNT, None, "a snapshot every so many epochs", "epochs"),
    Option("every_seconds", kinds.SECONDS, None, "a snapshot every so many seconds", "s"),
    Option("overhead_budget", kinds.SHARE, None, "as often as costs this share of training time", "share"),
    Option("mtbf_s", kinds.SECONDS, None, "mean time between failures, which chooses the interval", "s"),
    Option("keep", kinds.POLICY, None, "which snapshots stay (`ciuic prune --help`); none: all"),
    Option("rng", kinds.FLAG, True, "also capture the random generators"),
    Option("staging", kinds.choice("auto", "overlap", "blocking"), "auto", "how training state is copied"),
    Option("host_memory_bytes", kinds.MEMORY, None, "bound of the memory for staged snapshots", "bytes"),
    Option("when_busy", kinds.choice("wait", "skip"), "wait", "what to do while earlier snapshots are being written"),
    Option("busy_timeout_s", kinds.WAIT, 30.0, "how long `wait` waits, then the snapshot is skipped", "s"),
    Option("codec", kinds.choice("auto", "smallest", "raw"), "auto", "how bytes are encoded", readers=BOTH),
    Option("frozen", kinds.PATTERNS, (), "tensors that do not change, by patterns"),
    Option("preemption", kinds.GRACE, False, "at SIGTERM make the state durable within this time (true: 25 s)", "s"),
    Option("keeper", kinds.FLAG, False, "a process that finishes staged snapshots when training is killed"),
    Option("on_error", kinds.choice("warn", "raise"), "warn", "what failures in the background do to training"),
    Option(
        "key",
        kinds.PATH,
        None,
        "the signing key's file; the variable may also hold the key itself",
        readers=(CHAIN,),
        none_is_unset=True,
    ),
    Option(
        "ordering",
        kinds.ORDERING,
        None,
        "who decides who writes next; none: the place itself",
        readers=(CHAIN,),
        none_is_unset=True,
    ),
    Option("trust.policy", kinds.PATH_OR_TEXT, None, "whose word counts (docs/chain.md)", readers=(CHAIN,)),
    Option(
        "trust.witnesses",
        kinds.choice("async", "required"),
        "async",
        "whether a snapshot waits for the policy's witnesses",
        readers=(CHAIN,),
    ),
    Option("trust.max_age", kinds.AGE, None, "how old the newest sign of life may be", "s", readers=(CHAIN,)),
    Option(
        "trust.writers",
        kinds.choice("endorsed", "any"),
        "endorsed",
        "whether keys that the policy does not name may write",
        readers=(CHAIN,),
    ),
)
BY_NAME = {option.name: option for option in OPTIONS}
TABLES = frozenset(option.name.partition(".")[0] for option in OPTIONS if "." in option.name)

CONFIG = "CIUIC_CONFIG"
OTHER_VARIABLES = {
    CONFIG: "the configuration file, and no other; empty: none at all",
    "CIUIC_ETCD_PASSWORD": "the password of `ordering=etcd://user@...`; belongs into no file",
    "CIUIC_KEEPER_LOG": "a file for the messages of the keeper process",
    "CIUIC_ASYNC_NATIVE": "`0`: without the compiled core, slower",
    "CIUIC_ASYNC_SKIP_NATIVE": "read when the package is built: without the compiled core",
}
"""Variables that are no options: of the environment alone."""


def markdown() -> str:
    """The tables of ``docs/configuration.md``."""
    lines = ["| option | type | default | unit | variable | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for option in OPTIONS:
        cells = (
            f"`{option.name}`",
            option.kind.name,
            f"`{shown(option.default)}`",
            option.unit,
            f"`{option.environment}`",
            option.help.replace("|", "\\|"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| other variable | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """A value as a file would hold it; ``none`` for None."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case tuple() | list():
            return "[" + ", ".join(map(repr, value)) + "]"
        case float() if value.is_integer():
            return str(int(value))
        case _:
            describe = getattr(value, "describe", None)
            return str(describe() if callable(describe) else value)


if __name__ == "__main__":
    print(markdown(), end="")
