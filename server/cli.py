"""The `cadenza` program: reads the command line, then hands over to a command's module.

Imports nothing heavy, so that `cadenza --help` answers at once. A mistake of the user is one line and exit
status 1, never a traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from cadenza.decoding.request import EngineClosed, RequestError, RequestFailed
from cadenza.models.errors import ModelError
from cadenza.server.commands import adapters, options


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    module, function = args.command
    try:
        status: int = getattr(import_module(f"cadenza.server.commands.{module}"), function)(args)
    except (ModelError, RequestError, RequestFailed, EngineClosed) as error:
        print(f"cadenza: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cadenza", description="An OpenAI-compatible LLM inference server.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a model over HTTP"))
    _add_run(commands.add_parser("run", help="chat with a model in the terminal"))
    _add_plan(commands.add_parser("plan", help="say what serving a model would take, without loading it"))
    pull = commands.add_parser("pull", help="fetch a model and print where it lies")
    options.add_source(pull)
    pull.set_defaults(command=("cache", "pull"))
    commands.add_parser("models", help="list the models on this machine").set_defaults(
        command=("cache", "models")
    )
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=("serve", "serve"))
    options.add_source(parser)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_port, default=8000, help="0: any free one (default: %(default)s)")
    add("--served-model-name", nargs="+", default=[], metavar="NAME", help="what clients call the model")
    add(
        "--api-key",
        nargs="+",
        type=_key,
        default=[],
        metavar="KEY",
        help="keys to ask for; also CADENZA_API_KEY",
    )
    add(
        "--admin-api-key",
        nargs="+",
        type=_key,
        default=[],
        metavar="KEY",
        help="keys to ask for before what is served is changed; also CADENZA_ADMIN_API_KEY",
    )
    add(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM (default: %(default)s)",
    )
    add(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="debug also logs each request (default: %(default)s)",
    )
    options.add_loading(parser)
    options.add_engine(parser)
    adapters.add_sources(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=("chat", "run"))
    options.add_source(parser)
    group = parser.add_argument_group("conversation")
    add = group.add_argument
    add("--system", metavar="TEXT", help="a system message")
    add("--temperature", type=float)
    add("--top-p", type=float)
    add("--top-k", type=int)
    add("--max-tokens", type=int, help="longest answer")
    add("--seed", type=int, help="the same answers every time")
    options.add_loading(parser)
    options.add_own_adapters(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=("plan", "plan"))
    options.add_source(parser)
    parser.add_argument("--json", action="store_true", help="sizes in bytes, under keys that stay")
    options.add_loading(parser)
    options.add_engine(parser)


def _key(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a key must not be empty")
    return text


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is between 0 and 65535")
    return port


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from importlib.metadata import version

        print(f"cadenza {version('cadenza')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
