"""The page: knobs on one side, a volume that comes out of the noise on the other; drawn by Gradio."""

from __future__ import annotations

import ast
import html
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from scripts.page.studio import Moment, Studio, Wish
from scripts.running.errors import BundleError
from scripts.running.pictures import mosaic, triplanar

gr, has_gradio = optional_import("gradio")
logger = logging.getLogger(__name__)

TITLE = "Synthetic brain MRI"
NOTICE = (
    "**Synthetic, for research only.** A network draws these volumes out of noise. They show nobody, and say nothing "
    "about anybody's health."
)
PLANES = ("sagittal", "coronal", "axial")
UNKNOWN = "unknown"
PIXELS = 288  # of the longer side of a slice, at least
FRAMES = 12  # pictures on the way out of the noise
KEPT = 3600  # seconds that the files of a visitor are kept
PICTURE = {"format": "png", "elem_classes": "plane", "buttons": ["fullscreen"]}
CSS = """
.plane img {image-rendering: pixelated; object-fit: contain; background: black}
progress {width: 100%; accent-color: #f97316}
"""


def slice_of(volume: np.ndarray, axis: int, place: int) -> np.ndarray:
    """One slice of a RAS volume (*spatial) uint8, enlarged by a whole factor: (rows, columns) uint8.

    Superior (sagittal, coronal) or anterior (axial) is up, and left is left. A 2D image is shown whole.
    """
    picture = np.rot90(volume if volume.ndim == 2 else np.take(volume, place, axis))
    factor = max(1, -(-PIXELS // max(picture.shape)))
    return picture.repeat(factor, 0).repeat(factor, 1)


def slices(volume: np.ndarray, places: Sequence[int]) -> list[np.ndarray]:
    """A slice of each plane; of a 2D image one."""
    return [slice_of(volume, axis, int(place)) for axis, place in enumerate(places)]


def bar(moment: Moment, steps: int) -> str:
    """How far a wish has come, as HTML; each of its volumes takes so many steps."""
    volumes = f"volume {moment.volume + 1} of {moment.count}, " if moment.count > 1 else ""
    state = f"{volumes}step {moment.step} of {steps}" if moment.path is None else f"{volumes}done"
    said = html.escape(f"{moment.said}: {state}" if moment.said else state)
    done = f"max={moment.count * steps} value={moment.volume * steps + moment.step}"
    return f"<label>{said}<progress {done}></progress></label>"


def values_of(text: str) -> list[Any]:
    """The values of a sweep, such as "20, 40, 60" or "f, m".

    Raises:
        BundleError: there are none.
    """

    def value(word: str) -> Any:
        try:
            return ast.literal_eval(word)
        except (ValueError, SyntaxError):
            return word

    found = [value(word.strip()) for word in text.split(",") if word.strip()]
    if not found:
        raise BundleError(f"sweep: {text!r} was given; expected values with commas between, such as 20, 40, 60, 80")
    return found


def spread(covariate: Mapping[str, Any], count: int = 4) -> str:
    """Values from one end of what was trained on to the other."""
    if "words" in covariate:
        return ", ".join(covariate["words"][:6])
    values = np.linspace(covariate["min"], covariate["max"], count)
    return ", ".join(
        str(int(value)) if covariate["max"] - covariate["min"] > 10 else f"{value:.3g}" for value in values
    )


def plain(value: float) -> float | int:
    """70 for 70.0, as one types it."""
    return int(value) if float(value).is_integer() else float(value)


def as_wish(studio: Studio, seed: float, steps: float, guidance: float, asked: Sequence[Any]) -> Wish:
    """What the knobs say: of a number a switch and a slider, of words a list to choose from."""
    entries, said = iter(asked), {}
    for covariate in studio.covariates:
        chosen, value = next(entries), None
        if "words" in covariate:
            value = None if chosen == UNKNOWN else chosen
        else:
            number = next(entries)
            value = plain(number) if chosen else None
        if value is not None:
            said[covariate["name"]] = value
    return Wish(int(seed), int(steps), plain(guidance) if said else 1, said)


class Visitors:
    """Who is being served: who leaves, or presses Stop, ends what is sampled for him."""

    def __init__(self) -> None:
        self.gone: dict[str, threading.Event] = {}

    def arrives(self, session: str) -> threading.Event:
        """What is set once the visitor has gone."""
        return self.gone.setdefault(session, threading.Event())

    def leaves(self, session: str) -> None:
        self.gone.pop(session, threading.Event()).set()


def condition_knobs(studio: Studio) -> list[Any]:
    """What `as_wish` reads: of a number a switch and a slider, of words a list to choose from."""
    knobs = []
    for covariate in studio.covariates:
        name = covariate["name"].replace("_", " ")
        if "words" in covariate:
            knobs.append(gr.Dropdown([UNKNOWN, *covariate["words"]], value=UNKNOWN, label=name))
            continue
        low, high, mean = (covariate[key] for key in ("min", "max", "mean"))
        step = 1 if high - low > 10 else None
        with gr.Row():
            say = gr.Checkbox(False, label="say", min_width=70, scale=0)
            at = gr.Slider(low, high, round(mean) if step else mean, step=step, label=name, min_width=180)
            at.input(lambda: True, None, say, show_progress="hidden", api_name=False)
        knobs += [say, at]
    return knobs


def views(shape: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """A picture of each plane, and the slider of its place; a 2D image is one picture, and its slider is hidden."""
    sides, labels = (shape, PLANES) if len(shape) == 3 else ((1,), ("image",))
    pictures, places = [], []
    with gr.Row():
        for axis, (side, label) in enumerate(zip(sides, labels, strict=True)):
            with gr.Column(min_width=200):
                black = slice_of(np.zeros(shape, np.uint8), axis, 0)
                pictures.append(gr.Image(black, label=label, interactive=False, **PICTURE))
                places.append(gr.Slider(0, side - 1, side // 2, step=1, label="slice", visible=side > 1))
    return pictures, places


def page_of(studio: Studio, folder: str) -> Any:
    """The page, as a `gradio.Blocks`.

    Args:
        studio: that makes the volumes.
        folder: for the files of all visitors.
    """
    shape, visitors = studio.spatial_shape, Visitors()
    planes = 3 if len(shape) == 3 else 1

    def watched(wish: Wish, request: gr.Request) -> Iterator[tuple[str, Moment]]:
        """The moments of a wish, each with a bar, until its visitor has gone."""
        gone = visitors.arrives(request.session_hash)
        every = max(1, wish.num_inference_steps // FRAMES)
        with tempfile.TemporaryDirectory(dir=folder) as output_dir:  # Gradio copies what it offers, and keeps it
            for moment in studio.moments(wish, output_dir):
                if gone.is_set():
                    logger.info(f"ended at step {moment.step}: it was stopped, or its page was closed")
                    return
                if moment.path or moment.step % every == 0:
                    yield bar(moment, wish.num_inference_steps), moment

    def sample(request: gr.Request, *inputs):
        seed, steps, guidance, *rest = inputs
        asked, places = rest[:-planes], rest[-planes:]
        wish = as_wish(studio, seed, steps, guidance, asked)
        for state, moment in watched(wish, request):
            volume = moment.voxels.numpy().astype(np.uint8)
            yield (state, volume, *slices(volume, places), moment.path, command_of(wish) if moment.path else "")

    def sweep(request: gr.Request, *inputs):
        seed, steps, guidance, *asked, name, text = inputs
        wish = as_wish(studio, seed, steps, guidance, asked)
        wish = wish._replace(covariates={**wish.covariates, name: values_of(text)}, guidance_scale=plain(guidance))
        strips, paths = [], []
        for state, moment in watched(wish, request):
            strips[moment.volume :] = [triplanar(moment.voxels.numpy())]
            paths += [moment.path] if moment.path else []
            picture = mosaic(strips, labels=range(len(strips))).astype(np.uint8)
            yield state, picture, paths, command_of(wish) if moment.path else ""

    def command_of(wish: Wish) -> str:
        return f"The same, by the command line:\n```bash\n{studio.command(wish)}\n```"

    blocks = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT))
    with blocks:
        gr.Markdown(f"# {TITLE}\n{NOTICE}")
        volume = gr.State(np.zeros(shape, np.uint8), time_to_live=KEPT)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Row():
                    seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=120)
                    another = gr.Button("another seed", min_width=120)
                most = min(studio.most_steps, 100)
                steps = gr.Slider(1, most, min(25, most), step=1, label="steps", info="passes of the network")
                asked, names = condition_knobs(studio), [covariate["name"] for covariate in studio.covariates]
                guidance = gr.Slider(
                    1, 5, 1, step=0.5, label="guidance", info="above 1 exaggerates what is asked", visible=bool(names)
                )
                with gr.Row():
                    go = gr.Button("Sample", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=120)
            with gr.Column(scale=2, min_width=300):
                status = gr.HTML("Press Sample.", elem_id="status", min_height=60)
                pictures, places = views(shape)
                file = gr.File(label="download, with its seed and settings in the header", interactive=False, height=90)
                command = gr.Markdown()
        if names:
            with gr.Accordion("Sweep: one condition, the same noise", open=False):
                with gr.Row():
                    name = gr.Dropdown(names, value=names[0], label="condition", min_width=150)
                    text = gr.Textbox(spread(studio.covariates[0]), label="values", min_width=200, scale=2)
                    sweep_go = gr.Button("Sweep", variant="primary", min_width=120)
                sweep_status = gr.HTML(elem_id="sweep_status")
                row = gr.Image(label="one volume a row", interactive=False, **PICTURE)
                files = gr.File(label="download", interactive=False, file_count="multiple", height=200)
                listing = gr.Markdown()

        knobs = [seed, steps, guidance, *asked]
        go.click(
            sample,
            [*knobs, *places],
            [status, volume, *pictures, file, command],
            api_name="sample",
            show_progress_on=status,
            scroll_to_output=True,
            concurrency_id="network",
        )
        another.click(lambda: int(np.random.default_rng().integers(2**31)), None, seed, api_name=False)
        for axis, (picture, place) in enumerate(zip(pictures, places, strict=True)):
            place.input(
                lambda voxels, at, axis=axis: slice_of(voxels, axis, int(at)),
                [volume, place],
                picture,
                show_progress="hidden",
                trigger_mode="always_last",
                api_name=False,
            )
        if names:
            known = {covariate["name"]: covariate for covariate in studio.covariates}
            name.change(lambda chosen: spread(known[chosen]), name, text, api_name=False)
            sweep_go.click(
                sweep,
                [*knobs, name, text],
                [sweep_status, row, files, listing],
                api_name="sweep",
                show_progress_on=sweep_status,
                concurrency_id="network",
            )

        def leave(request: gr.Request) -> None:
            visitors.leaves(request.session_hash)

        stop.click(leave, None, None, queue=False, api_name=False)
        blocks.unload(leave)
    return blocks.queue(default_concurrency_limit=1)


def serve(
    ckpt_path: str,
    config_file: str | Sequence[str],
    weights: str,
    knobs: Mapping[str, Any],
    device: torch.device | str,
    host: str,
    port: int,
) -> None:
    """Open the page, until Ctrl-C.

    Args:
        ckpt_path, config_file, weights, knobs, device: see `Studio`.
        host: address to listen at; "127.0.0.1" is this machine alone, "0.0.0.0" everybody who reaches it.
        port: to listen at.

    Raises:
        BundleError: Gradio is not installed, the port is taken, or what `Studio` refuses.
    """
    if not has_gradio:
        raise BundleError("the page needs Gradio, which is not installed; pip install -r requirements-page.txt")
    studio = Studio(ckpt_path, config_file, weights, knobs, device)
    with tempfile.TemporaryDirectory(prefix="page_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "cache")
        font = ["system-ui", "sans-serif"]  # of the visitor's machine: nothing is fetched from elsewhere
        try:
            page_of(studio, folder).launch(
                server_name=host,
                server_port=port,
                theme=gr.themes.Default(font=font, font_mono=["monospace"]),
                css=CSS,
                allowed_paths=[folder],
                footer_links=[],
                quiet=True,
                show_error=True,
                prevent_thread_lock=False,
            )
        except OSError as e:
            raise BundleError(
                f"port: {port} was given, but {host}:{port} cannot be listened at ({e}); expected a free one"
            ) from e
