"""Evaluation that is killed or started twice: every file is whole, and the numbers are those of one never killed."""

import fcntl
import json
import random
import signal
import time
import zipfile

import pytest
from harness import sentence, start
from PIL import Image

from scripts.scans.phantoms import phantom_cohort

KNOBS = {
    "config_file": "configs/evaluate.json",
    "spatial_shape": "[16,16,16]",
    "num_pairs": 6,
    "brain_extraction": "false",
}
RESULTS = ("metrics.json", "metrics.csv")


@pytest.fixture(scope="module")
def knobs(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohorts")
    real, ours = (phantom_cohort(str(root / name), 4, (20, 20, 20), 8.0, seed=seed) for seed, name in enumerate("ab"))
    return KNOBS | {"real_dir": real, "synthetic_dirs": repr({"ours": ours})}


@pytest.fixture(scope="module")
def undisturbed(knobs, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "evaluation"
    run = start(output, "run", **knobs, output_dir=output)
    assert run.wait() == 0, run.text()
    return output


def torn(output):
    """Files under their final names that cannot be read to their end."""
    found = []
    for path in output.rglob("*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                with Image.open(path) as picture:
                    picture.load()
            elif path.suffix == ".pt":
                with zipfile.ZipFile(path) as file:
                    assert file.testzip() is None
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>")
        except Exception as e:
            found.append((path.name, e))
    return found


def names(output):
    return sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.suffix != ".pt" and p.name != "config")


def complete(output, undisturbed):
    assert torn(output) == []
    for name in RESULTS:
        assert (output / name).read_text() == (undisturbed / name).read_text()
    assert not list(output.rglob("*.partial"))
    assert names(output) == names(undisturbed)


def kill_again_and_again(kills, seed, knobs, undisturbed, folder):
    """Kill -9 runs that each go on where the one before was killed, until one of them is let to its end.

    Half of the kills come after a random time, half just before a random one of the changes to the files.

    Returns:
        rows (results in parts/ before the kill, after it, what came, partial files left).
    """
    moments, table, number = random.Random(seed), [], 0
    while len(table) < kills:
        output = folder / str(number)
        before = {path: path.read_text() for path in output.glob("parts/*.json")}
        at_change = moments.randint(1, 50) if moments.random() < 0.5 else 0
        run = start(output, "run", die_at=at_change, **knobs, output_dir=output)
        if not at_change:
            enough = len(before) + moments.choice((0, 1, 3, 5, 7))
            run.until(lambda output=output, enough=enough: len(list(output.glob("parts/*.json"))) >= enough)
            time.sleep(moments.uniform(0, 4 if enough == len(before) else 0.3))
            run.send(signal.SIGKILL)
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.text()
        assert torn(output) == []
        assert all(path.read_text() == text for path, text in before.items())  # no result is lost or measured again
        after, partial = len(list(output.glob("parts/*.json"))), len(list(output.rglob("*.partial")))
        if status:
            table.append((len(before), after, f"change {at_change}" if at_change else "time", partial))
        if status == 0 or moments.random() < 0.6 or len(table) == kills:
            run = start(output, "run", **knobs, output_dir=output)
            assert run.wait() == 0, run.text()
            complete(output, undisturbed)
            number += 1
    return table


def test_a_killed_evaluation_goes_on_to_the_same_numbers(knobs, undisturbed, tmp_path):
    kill_again_and_again(1, 0, knobs, undisturbed, tmp_path)


@pytest.mark.slow
def test_an_evaluation_killed_20_times_goes_on_to_the_same_numbers(knobs, undisturbed, tmp_path):
    table = kill_again_and_again(20, 1, knobs, undisturbed, tmp_path)
    print("\nresults before | after | killed at | partial files")
    print("\n".join(" | ".join(map(str, row)) for row in table))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_at_once_and_it_says_how_to_go_on(knobs, undisturbed, tmp_path, number, status):
    run = start(tmp_path, "run", **knobs, output_dir=tmp_path)
    run.until(lambda: list(tmp_path.glob("parts/*.json")))
    run.send(number)
    assert run.wait() == status, run.text()
    there, whole = (len(list(folder.glob("parts/*.json"))) for folder in (tmp_path, undisturbed))
    assert f"{there} of {whole} results are in {str(tmp_path / 'parts')!r}; the same command goes on" in run.text()
    assert "Traceback" not in run.text() and not (tmp_path / "metrics.json").exists()
    again = start(tmp_path, "run", **knobs, output_dir=tmp_path)
    assert again.wait() == 0, again.text()
    complete(tmp_path, undisturbed)


def test_a_second_evaluation_in_the_folder_is_told_before_any_work(knobs, tmp_path):
    output = tmp_path / "evaluation"
    output.mkdir()
    with open(output / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 1 on elsewhere\n")
        file.flush()
        said = sentence(start(output, "run", **knobs, output_dir=output))
    assert "output_dir: another run is writing" in said and "process 1 on elsewhere" in said
    assert [path.name for path in output.iterdir()] == [".lock"]
