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
    _add_score(commands)
    _add_report(commands)
    _add_watch(commands)
    return parser


def _searching() -> argparse.ArgumentParser:
    """The options of those commands that search in MLflow."""
    parser = argparse.ArgumentParser(add_help=False)
    found = parser.add_argument_group("which traces")
    found.add_argument(
        "--experiment",
        dest="experiment_names",
        action="append",
        metavar="NAME",
        help="an experiment by name; more than once for several (default: the active one, as "
        "MLFLOW_EXPERIMENT_NAME names it)",
    )
    found.add_argument(
        "--experiment-id",
        dest="experiment_ids",
        action="append",
        metavar="ID",
        help="an experiment by id; more than once for several",
    )
    found.add_argument(
        "--filter",
        dest="filter_string",
        metavar="FILTER",
        help="a filter of MLflow's, such as \"trace.status = 'OK'\"",
    )
    found.add_argument(
        "--since", metavar="TIME", help="the earliest time: how long ago (24h, 7d) or ISO 8601"
    )
    found.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow's store (default: the one in force)"
    )
    return parser


def _scoring() -> argparse.ArgumentParser:
    """The options of those commands that score."""
    parser = argparse.ArgumentParser(add_help=False)
    found = parser.add_argument_group("how to score")
    found.add_argument(
        "--max-scores-per-minute",
        type=float,
        metavar="N",
        help="score no faster than that; the command waits",
    )
    found.add_argument(
        "--max-concurrency", type=int, metavar="N", help="scores in flight at once (default: 64)"
    )
    found.add_argument(
        "--sample-rate",
        type=float,
        metavar="SHARE",
        help="score that share of the calls, in [0, 1]",
    )
    found.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="how long one score may take (default: 30)"
    )
    found.add_argument(
        "--no-assessments",
        dest="assessments",
        action="store_false",
        help="write tags and scoring spans only, which is about twice as fast",
    )
    found.add_argument(
        "--shard",
        metavar="K/N",
        help="score only the K-th of N parts, for N workers at the same time, such as 3/8",
    )
    found.add_argument("--quiet", action="store_true", help="don't say how far it is")
    return parser


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        parents=[_searching(), _scoring()],
        help="score traces that MLflow has stored",
        description="Scores the LLM calls in stored traces, whoever recorded them, writes the "
        "scores back and shows the least trustworthy. What has a score is left alone, so the same "
        "command goes on where one was stopped. The exit status is 1 if something could not be "
        "scored or written, 130 if it was stopped.",
    )
    score.add_argument("--until", metavar="TIME", help="the latest time")
    score.add_argument(
        "--limit", type=int, metavar="N", help="send something of at most N traces, the newest"
    )
    score.add_argument(
        "--rescore", action="store_true", help="score what has a score, too, in its place"
    )
    score.add_argument(
        "--dry-run", action="store_true", help="tell how much would be sent; send and write nothing"
    )
    score.add_argument(
        "-n", type=int, default=10, metavar="N", help="how many answers to show (default: 10)"
    )
    score.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    score.set_defaults(run=_score)


def _add_watch(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        parents=[_searching(), _scoring()],
        help="score new traces as they arrive",
        description="Scores new traces as they arrive, for applications that only record "
        '(mode="off"). Ends at SIGTERM or Ctrl-C; what was sent by then is written.',
    )
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="how often to look (default: 5)",
    )
    watch.set_defaults(run=_watch, since="1h")


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        parents=[_searching()],
        help="show the least trustworthy answers, in the terminal and as a page",
        description="Shows the least trustworthy answers that MLflow has, and writes one HTML file "
        "on these and all others that opens without a network.",
    )
    report.add_argument("--until", metavar="TIME", help="the latest time")
    report.add_argument("--html", metavar="FILE", help="write the page to this file")
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


def _score(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tlm_tracing._commands import _score

    return _score.run(vars(options))


def _watch(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tlm_tracing._commands import _watch

    return _watch.run(vars(options))


def _report(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tlm_tracing import _report

    asked = {key: value for key, value in vars(options).items() if key not in ("command", "run")}
    return _report.run(**asked)
