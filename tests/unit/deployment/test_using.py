"""Programs that use a release while it is switched: the ones that the documentation shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DOCUMENT = Path(__file__).parents[3] / "docs" / "deployment.md"
SWITCHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import releases
root = sys.argv[2]
for line in sys.stdin:
    verb, request = json.loads(line)
    print(json.dumps(getattr(releases, verb)(root, request)), flush=True)
"""


def example(language):
    """The program in that language that the documentation shows."""
    section = DOCUMENT.read_text().split("\n## Using the release\n")[1].split("\n## ")[0]
    (found,) = re.findall(f"```{language}\n(.*?)```", section, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two artifacts with class names of their own."""
    torch = pytest.importorskip("torch")
    from edgeprune import compile as compile_artifact

    torch.set_num_threads(1)
    folder, made = tmp_path_factory.mktemp("labelled"), []
    for letter in "ab":
        torch.manual_seed(ord(letter))
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        labels = [f"{letter}{number}" for number in range(10)]
        made.append(compile_artifact(net, torch.randn(1, 3, 8, 8), folder / letter, name=letter, labels=labels))
    return made


@pytest.fixture
def image(tmp_path):
    """Path and contents of one input."""
    values = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype("float32")
    path = tmp_path / "an image.npy"
    np.save(path, values)
    return path, values


def answers(labelled, values):
    """What each release says to an input, in the words of the documented program."""
    import onnxruntime

    said = {}
    for artifact in labelled:
        session = onnxruntime.InferenceSession(str(artifact.engine), providers=["CPUExecutionProvider"])
        (scores,) = session.run(None, {session.get_inputs()[0].name: values})
        best = int(scores.argmax())
        said[artifact.release] = f"{artifact.release} {artifact.model['labels'][best]} {scores.flat[best]:.6g}"
    return said


def put(board, artifact):
    """Stage an artifact on the board."""
    store = board.root / "store"
    store.mkdir(parents=True, exist_ok=True)
    files = {}
    for path in artifact.folder.iterdir():
        content = path.read_bytes()
        files[path.name] = {"sha256": board.digest(content), "size_bytes": len(content)}
        (store / files[path.name]["sha256"]).write_bytes(content)
    return board.call("stage", release=artifact.release, files=files)["folder"]


class Lines:
    """A program that answers each line with one."""

    def __init__(self, arguments, **environment):
        self.process = subprocess.Popen(
            [str(word) for word in arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **environment},
        )

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        answer = self.process.stdout.readline()
        assert answer, "the program must live"
        return answer.strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


def test_program_of_the_documentation_answers_through_fifty_switches_with_whole_releases_only(
    board, labelled, image, tmp_path
):
    path, values = image
    said = answers(labelled, values)
    folders = [put(board, artifact) for artifact in labelled]
    program = tmp_path / "consumer.py"
    program.write_text(example("python"))
    with Lines([sys.executable, "-c", SWITCHER, board.program, board.root]) as switcher:

        def switch(verb, **request):
            return json.loads(switcher.ask(json.dumps([verb, request])))["current"]

        assert switch("activate", folder=folders[0]) == folders[0]
        with Lines([sys.executable, program], EDGEPRUNE_ROOT=str(board.root)) as consumer:
            assert consumer.ask(path) == said[folders[0]]
            seen = set()
            for cycle in range(25):
                for verb, request, now in (
                    ("activate", {"folder": folders[1]}, folders[1]),
                    ("rollback", {"from": folders[1], "verify": False}, folders[0]),
                ):
                    # An inference is under way while the link moves.
                    consumer.process.stdin.write(f"{path}\n")
                    assert switch(verb, **request) == now
                    during = consumer.process.stdout.readline().strip()
                    assert during in said.values(), f"cycle {cycle}: neither release says so"
                    assert consumer.ask(path) == said[now]
                    seen.add(during)
    assert consumer.process.returncode == 0
    assert seen <= set(said.values())


def test_release_runs_by_itself_on_a_file(board, labelled, image):
    path, values = image
    folder = put(board, labelled[0])
    board.call("activate", folder=folder)
    command = [sys.executable, str(board.root / "current" / "infer.py")]
    name = labelled[0].model["inputs"][0]["name"]
    done = subprocess.run([*command, f"{name}={path}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"best: {answers(labelled, values)[folder].split()[1]}" in done.stdout
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert wrong.stderr == (
        f"error: input {name!r} must be [1, 3, 8, 8] of float32, found None. Try: infer.py {name}=FILE.npy\n"
    )


def test_loaded_release_stays_when_the_link_goes(board, labelled, monkeypatch):
    folder = put(board, labelled[0])
    board.call("activate", folder=folder)
    monkeypatch.syspath_prepend(str(board.root / "current"))
    import infer

    model = infer.Model(str(board.root / "current"))
    assert model.fresh() is model
    (board.root / "current").unlink()
    assert model.fresh() is model
    assert model.release == folder
    with pytest.raises(OSError, match=r"model\.json"):
        infer.Model(str(board.root / "current"))
    sys.modules.pop("infer")


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_examples_are_about_thirty_lines(language):
    lines = [line for line in example(language).splitlines() if line.strip() and not line.startswith("//")]
    assert len(lines) <= 40
