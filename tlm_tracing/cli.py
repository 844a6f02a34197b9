"""The command line: ``tlm-tracing``, a thin skin over the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


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
    _add_report(commands)
    return parser


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="show the least trustworthy answers, in the terminal and as a page",
        description="Shows the least trustworthy answers that MLflow has, and writes one HTML file "
        "on these and all others that opens without a network.",
    )
    for option, name, metavar, told in (
        (
            "--experiment",
            "experiment_names",
            "NAME",
            "an experiment by name; more than once for "
            "several (default: the active one, as MLFLOW_EXPERIMENT_NAME names it)",
        ),
        (
            "--experiment-id",
            "experiment_ids",
            "ID",
            "an experiment by id; more than once for several",
        ),
    ):
        report.add_argument(option, dest=name, action="append", metavar=metavar, help=told)
    for option, name, metavar, told in (
        (
            "--filter",
            "filter_string",
            "FILTER",
            "a filter of MLflow's, such as \"trace.status = 'OK'\"",
        ),
        ("--since", "since", "TIME", "the earliest time: how long ago (24h, 7d) or ISO 8601"),
        ("--until", "until", "TIME", "the latest time"),
        ("--html", "html", "FILE", "write the page to this file"),
        ("--tracking-uri", "tracking_uri", "URI", "MLflow's store (default: the one in force)"),
    ):
        report.add_argument(option, dest=name, metavar=metavar, help=told)
    report.add_argument(
        "-n", type=int, default=20, metavar="N", help="how many answers to show (default: 20)"
    )
    report.add_argument(
        "--threshold", type=float, metavar="SCORE", help="a score in [0, 1] to mark"
    )
    report.add_argument(
        "--json", dest="as_json", action="store_true", help="print one JSON object, for programs"
    )
    report.set_defaults(run=_report)


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


def _report(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tlm_tracing import _report

    asked = {key: value for key, value in vars(options).items() if key not in ("command", "run")}
    return _report.run(**asked)
