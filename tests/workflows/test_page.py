"""The page: what it samples, and whom it serves; driven by Gradio's own client, and by a browser where there is one."""

import hashlib
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, bundle_command, free_port, quiet, run_bundle, serving, workflow

from scripts.page.layout import slice_of
from scripts.scans.phantoms import phantom_cohort

gradio_client = pytest.importorskip("gradio_client", reason="pip install -r requirements-page.txt")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Of a tiny training that is told age and sex."""
    output = tmp_path_factory.mktemp("told")
    people = phantom_cohort(str(output / "people"), 8, (20, 20, 20), 8.0, people=True)
    workflow(
        "train", output, dataset_dir=people, covariates=["age", "sex"], val_fraction=0.3, norm_num_groups=4,
        max_iterations=2, preview_interval=9,
    ).run()  # fmt: skip
    return output / "models/model.pt"


@pytest.fixture(scope="module")
def page(weights):
    port = free_port()
    with serving(
        bundle_command("run", "page", config_file="configs/page.json", ckpt_path=weights, port=port), port
    ) as it:
        yield it


def client_of(page):
    return gradio_client.Client(page.url, verbose=False)


def contents(*paths):
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def by_command(text: str, output_dir: Path) -> list[Path]:
    """The volumes that the command makes which the page shows."""
    command = shlex.split(text.split("```bash\n")[1].split("\n```")[0])
    assert command[:4] == ["python", "-m", "monai.bundle", "run"]
    command = [sys.executable, "-W", "ignore", *command[1:], "--output_dir", str(output_dir)]
    done = subprocess.run(command, cwd=ROOT, env=quiet(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return sorted(output_dir.glob("*.nii.gz"))


SAMPLE = {"api_name": "/sample"}
MIDDLE = (8, 8, 8)


def test_a_volume_is_the_file_that_the_command_writes(page, tmp_path):
    job = client_of(page).submit(7, 4, 2, True, 70.0, "m", *MIDDLE, **SAMPLE)
    status, *pictures, path, command = job.result(timeout=120)
    assert "age 70, sex m: done" in status and len(pictures) == 3
    assert len(job.outputs()) == 5  # each of four steps, and the volume
    assert nib.load(path).header["descrip"].item().decode().endswith("seed 7, volume 0, age 70, sex m")
    made = by_command(command, tmp_path)
    assert [file.name for file in made] == [Path(path).name] and contents(*made) == contents(path)


def test_a_sweep_is_the_files_of_a_sweep(page, tmp_path):
    client = client_of(page)
    _, _, paths, command = client.predict(3, 2, 1, False, 50, "unknown", "age", "30, 60", api_name="/sweep")
    made = by_command(command, tmp_path)
    assert [Path(path).name for path in paths] == [f"sample_seed3_volume000_age{age}.nii.gz" for age in (30, 60)]
    assert contents(*made) == contents(*paths)
    with pytest.raises(Exception, match="sex 'x' was given; it must be one of"):
        client.predict(3, 2, 1, False, 50, "unknown", "sex", "f, x", api_name="/sweep")
    with pytest.raises(Exception, match="expected values with commas between"):
        client.predict(3, 2, 1, False, 50, "unknown", "sex", " ", api_name="/sweep")


def test_two_visitors_are_served_in_turn(page):
    jobs = [client_of(page).submit(seed, 4, 1, False, 50, "unknown", *MIDDLE, **SAMPLE) for seed in (1, 2)]
    paths = [job.result(timeout=120)[4] for job in jobs]
    assert [Path(path).name for path in paths] == [f"sample_seed{seed}_volume000.nii.gz" for seed in (1, 2)]
    assert len(set(contents(*paths))) == 2


VISIT = """
import sys, time
from gradio_client import Client
ages = ", ".join(str(20 + i / 10) for i in range(500))  # more than are made before anybody notices
job = Client(sys.argv[1], verbose=False).submit(1, 10, 1, False, 50, "unknown", "age", ages, api_name="/sweep")
while not job.outputs():
    time.sleep(0.01)
print("watching", flush=True)
time.sleep(600)
"""


def test_a_visitor_who_leaves_ends_what_was_sampled_for_him(page):
    visitor = subprocess.Popen([sys.executable, "-c", VISIT, page.url], stdout=subprocess.PIPE, text=True)
    assert visitor.stdout.readline() == "watching\n"
    visitor.kill()
    made = page.log().count("_volume000_age")
    job = client_of(page).submit(2, 4, 1, False, 50, "unknown", *MIDDLE, **SAMPLE)  # after 500 ages, or at once
    job.result(timeout=60)
    assert page.log().count("_volume000_age") <= made + 5  # by Gradio, which drops what nobody reads, or by the page


def test_only_this_machine_is_served_unless_told_otherwise(page):
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", page.port), timeout=5)


def test_weights_that_are_not_there_are_said_before_the_page_opens():
    done = run_bundle("run", "page", config_file="configs/page.json", ckpt_path="nowhere.pt")
    assert done.returncode == 1 and "nowhere.pt" in done.stderr, done.stderr


def test_a_port_that_is_taken_is_said(weights, page):
    done = run_bundle("run", "page", config_file="configs/page.json", ckpt_path=weights, port=page.port)
    assert done.returncode == 1 and f"port: {page.port} was given" in done.stderr, done.stderr


def test_a_slice_has_superior_up_and_left_at_the_left():
    volume = np.zeros((4, 6, 8), np.uint8)
    volume[0, 5, 7] = 255  # left, anterior, superior
    for axis, shape in enumerate([(8, 6), (8, 4), (6, 4)]):
        picture = slice_of(volume, axis, (0, 5, 7)[axis])
        factor = 288 // max(shape)
        assert picture.shape == (shape[0] * factor, shape[1] * factor)
        corner = (0, -1) if axis == 0 else (0, 0)  # in the sagittal plane anterior is at the right
        assert picture[corner] == 255 and (picture > 0).sum() == factor**2


def test_in_a_browser_one_samples_slides_stops_and_downloads(page, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def button(text):
        return next(b for b in browser.find_elements(By.TAG_NAME, "button") if b.text.strip() == text)

    def numbered(label, value, place=0):
        field = browser.find_elements(By.CSS_SELECTOR, f'input[aria-label="number input for {label}"]')[place]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(f"{value}", Keys.TAB)

    def status():
        return browser.find_element(By.ID, "status").text

    def axial():
        return browser.find_elements(By.CSS_SELECTOR, ".plane img")[2].get_attribute("src")

    wait = WebDriverWait(browser, 60, ignored_exceptions=[StopIteration, IndexError])
    browser.set_window_size(1280, 1100)
    browser.get(page.url)
    wait.until(lambda _: button("Sample"))
    assert "Synthetic, for research only." in browser.find_element(By.TAG_NAME, "body").text
    numbered("steps", 4)
    numbered("age", 64)  # which says the age, too
    button("Sample").click()
    wait.until(lambda _: "age 64: done" in status())
    before = axial()
    numbered("slice", 3, place=2)
    wait.until(lambda _: axial() != before)
    browser.find_element(By.CSS_SELECTOR, "a[download]").click()
    downloaded = tmp_path / "downloads/sample_seed0_volume000.nii.gz"
    wait.until(lambda _: downloaded.exists())
    made = by_command("```bash\n" + browser.find_element(By.CSS_SELECTOR, "code").text + "\n```", tmp_path / "made")
    assert contents(*made) == contents(downloaded)
    browser.set_window_size(400, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
