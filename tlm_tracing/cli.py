"""The command line: ``tlm-tracing``, a thin skin over the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0, or 2 if the command can't be run as given.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    return int(options.run(options, parser))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tlm-tracing", description="Trust scores for OpenAI answers, kept in MLflow."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="run a little application on canned answers, without any keys",
        description="Asks five questions, scores the answers, and leaves five traces in MLflow.",
    )
    demo.add_argument(
        "--live",
        action="store_true",
        help="ask the real services, with OPENAI_API_KEY and CLEANLAB_TLM_API_KEY",
    )
    demo.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="where MLflow keeps the traces (default: mlflow.db in this directory)",
    )
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tlm_tracing import _demo

    if options.live and (missing := _demo.missing_keys()):
        parser.error(f"--live needs {' and '.join(missing)} to be set; without --live none is.")
    _demo.run(live=options.live, tracking_uri=options.tracking_uri)
    return 0
