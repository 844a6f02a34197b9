"""The front door: few names, and nothing heavy or visible happens when it is opened."""

import subprocess
import sys

import pytest

import tlm_tracing as tt

HEAVY = ("openai", "mlflow", "cleanlab_tlm", "aiohttp", "pandas", "rich", "pytest")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "module", ["tlm_tracing", "tlm_tracing.cli", "tlm_tracing.exceptions", "tlm_tracing.scorers"]
)
def test_importing_brings_nothing_heavy(module):
    found = run(f"import sys, {module}; print([n for n in {HEAVY!r} if n in sys.modules])")
    assert found.stdout.strip() == "[]"


def test_decorating_and_configuring_bring_nothing_heavy():
    found = run(
        "import sys, tlm_tracing as tt\n"
        "tt.configure(threshold=0.5)\n"
        "@tt.trusted\n"
        "def f(): pass\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules])"
    )
    assert found.stdout.strip() == "[]"


def test_the_pytest_plugin_brings_nothing_heavy():
    heavy = tuple(name for name in HEAVY if name != "pytest")
    found = run(
        f"import sys, tlm_tracing.testing.plugin; print([n for n in {heavy!r} if n in sys.modules])"
    )
    assert found.stdout.strip() == "[]"


def test_importing_starts_no_thread_and_changes_no_class():
    run(
        "import threading, openai\n"
        "before = dict(vars(openai.OpenAI)), threading.active_count()\n"
        "import tlm_tracing as tt\n"
        "for name in tt.__all__: getattr(tt, name)\n"
        "assert before == (dict(vars(openai.OpenAI)), threading.active_count())\n"
    )


def test_every_public_name_is_there_and_documented():
    for name in tt.__all__:
        assert getattr(tt, name).__doc__
    assert set(tt.__all__) <= set(dir(tt))


def test_the_version_is_the_installed_one():
    assert tt.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="trustd"):
        _ = tt.trustd
