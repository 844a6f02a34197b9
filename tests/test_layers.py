"""The design's import table, executed: imports run down only, third parties have named rooms."""

import ast
from pathlib import Path

import pytest

import tlm_tracing

PACKAGE = Path(tlm_tracing.__file__).parent
FLOORS = [
    {"_data", "exceptions", "_light", "_live", "_redacted", "_threads"},
    {
        "_config",
        "_messages",
        "_endpoints",
        "_watching",
        "_bodies",
        "_streams",
        "_annotate",
        "_scope",
        "_limits",
    }
    | {"_patches", "_turns", "_visible", "_outbox", "_tracking", "_batch", "_exporter"}
    | {"_ready", "_bulk", "testing"},
    {"_record", "_scoring", "scorers"},
    {"_asking", "_cache", "_telemetry", "_returned", "_pipeline", "_propagation", "_ends"},
    {"_hook", "_stored", "tlm_client"},
    {"_span", "openai", "_report", "evaluation"},
    {"_demo", "_doctor", "_commands", "model"},
    {"cli", "__init__"},
]
STEPS = {"_record", "_scoring", "scorers"}
ROOMS = {
    "mlflow": {
        "_light",
        "_live",
        "_tracking",
        "_exporter",
        "_bulk",
        "_ready",
        "_record",
        "_annotate",
    }
    | {"_stored", "_report", "_commands", "_demo", "_doctor", "evaluation", "model"},
    "opentelemetry": {"_light", "_live", "_telemetry", "_tracking", "_bulk"},
    "openai": {"_hook", "_streams", "_bodies", "_endpoints", "openai", "model"}
    | {"_demo", "_doctor"},
    "cleanlab_tlm": {"scorers"},
    "aiohttp": {"scorers", "testing"},
    "packaging": {"_doctor"},
    "pandas": {"_stored", "_report"},
    "jinja2": {"_report"},
    "matplotlib": {"_report"},
    "rich": {"_report", "_commands", "_demo", "_doctor"},
    "wrapt": {"_patches", "tlm_client"},
    "pytest": {"testing"},
}
ENVIRONMENT_READERS = {"_config", "_demo", "_doctor", "testing"}
THREAD_STARTERS = {"_threads", "testing"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    """The module or package right below tlm_tracing that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every import of a file, and whether it is for type checkers only."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def neighbours(path):
    """The other rooms that a file imports from."""
    for name in imports(path):
        package, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if package == "tlm_tracing" and there in set().union(*FLOORS) - {room(path)}:
            yield there


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down(path):
    here = room(path)
    for there in neighbours(path):
        assert floor(there) <= floor(here), f"{here} imports {there}"
        assert not {here, there} <= STEPS, f"{here} and {there} are both steps"


def test_there_are_no_circles():
    graph = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(neighbours(path))

    def visit(name, above):
        assert name not in above, f"circle: {' -> '.join((*above, name))}"
        for below in graph[name]:
            visit(below, (*above, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("library", ROOMS)
def test_a_third_party_is_met_in_its_rooms_only(library):
    users = {
        room(path) for path in FILES for name in imports(path) if name.split(".")[0] == library
    }
    assert users == ROOMS[library]


def test_the_environment_is_read_in_one_room():
    found = {room(path) for path in FILES if "os.environ" in path.read_text("utf-8")}
    assert found == ENVIRONMENT_READERS


def test_threads_are_started_in_few_rooms():
    found = {room(path) for path in FILES if "threading.Thread(" in path.read_text("utf-8")}
    assert found == THREAD_STARTERS
