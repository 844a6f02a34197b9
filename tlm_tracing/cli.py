"""The command line: ``tlm-tracing``, a thin skin over the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0, 1 if the doctor found a problem, or 2 if the command can't be run as
        given.
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
    doctor = commands.add_parser(
        "doctor",
        help="check packages, settings, keys, the LLM endpoint, Cleanlab and MLflow",
        description="Checks all that tracing needs, and says for each problem what to do. Writes "
        "one trace to MLflow, reads it back and deletes it; asks Cleanlab for one score, which it "
        "bills. Never prints a key. The exit status is 1 if there is any problem.",
    )
    doctor.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow's store (default: the one in force)"
    )
    doctor.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long each check may take (default: 10)",
    )
    doctor.add_argument("--no-score", action="store_true", help="don't ask Cleanlab for a score")
    doctor.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    doctor.set_defaults(run=_doctor)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 3600:
        raise ValueError
    return seconds


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tlm_tracing import _demo

    if options.live and (missing := _demo.missing_keys()):
        parser.error(f"--live needs {' and '.join(missing)} to be set; without --live none is.")
    _demo.run(live=options.live, tracking_uri=options.tracking_uri)
    return 0


def _doctor(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tlm_tracing import _doctor

    found = _doctor.run(
        tracking_uri=options.tracking_uri,
        timeout=options.timeout,
        score=not options.no_score,
        as_json=options.json,
    )
    return _doctor.end(_doctor.status(found))
