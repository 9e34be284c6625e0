"""Serve trained models as a web page on this machine: drop an image, see and explain objects.

The page is built with Gradio, an extra. Nothing leaves the machine: it listens on the loopback
address alone, and sharing, analytics and requests to other hosts are off.
"""

import argparse
import logging
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..visualization.draw_modulation import figure_picture
from ..visualization.sheet import Picture
from .prediction import Prediction
from .predictor import Predictor
from .regions import STYLE, Region, regions_of, render
from .why import why_box

logger = logging.getLogger("focalnet_det")

HOST, PORT = "127.0.0.1", 7860
# Set before Gradio is imported, which would look for a newer version of itself.
OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SERVER_NAME": HOST,
    "GRADIO_SHARE": "False",
}
EXAMPLES = """examples:
  # the best weights of a run, at http://127.0.0.1:7860
  focalnet-det serve output/mine

  # several models to choose from
  focalnet-det serve output/mine output/other --port 8000
"""
# Reports the region that is clicked, and keeps it highlighted.
CLICKS = """
element.addEventListener('click', event => {
  const region = event.target.closest('.region');
  if (!region) return;
  element.querySelectorAll('.chosen').forEach(other => other.classList.remove('chosen'));
  region.classList.add('chosen');
  trigger('select', {index: Number(region.dataset.index)});
});
"""
EMPTY = "<p>Drop an image on the left.</p>"
HINT = "Click an object to see which focal levels and places the backbone draws on for it."


class App:
    """Logic of the page, without the page: messages for the user are returned, not raised.

    Args:
        models: folders of runs, or checkpoints. They are loaded when they are first used.
        device: of PyTorch; None for a GPU if there is one.
    Raises: ValueError if there is no model, or one does not exist.
    """

    def __init__(self, models: Sequence[str | Path], *, device: str | None = None) -> None:
        self.paths = _named(models)
        self.device = device
        self._predictors: dict[str, Predictor] = {}
        # The requests of several tabs come in threads, and explaining puts hooks into the model.
        self._lock = threading.Lock()

    def predictor(self, model: str) -> Predictor:
        """Return a model by its name. Raises: ValueError or OSError if it cannot be loaded."""
        if model not in self.paths:
            raise ValueError(f"No model {model!r}: choose one of {', '.join(self.paths)}.")
        if model not in self._predictors:
            self._predictors[model] = Predictor(self.paths[model], device=self.device)
        return self._predictors[model]

    def predict(self, model: str, file: str | None) -> tuple[Prediction | None, str]:
        """Predict for an image file.

        Returns: the prediction, or None and a sentence that says why there is none.
        """
        if not file:
            return None, ""
        try:
            with self._lock:
                return self.predictor(model)(file), ""
        except (OSError, ValueError) as error:
            # The page keeps uploads under names of its own.
            return None, _sentence(error).replace(file, Path(file).name)

    def show(self, prediction: Prediction | None, threshold: float) -> tuple[str, str]:
        """Return the picture as HTML, and a sentence about it.

        Args:
            prediction: of :meth:`predict`.
            threshold: least score of instances.
        """
        if prediction is None:
            return EMPTY, ""
        regions = regions_of(prediction, threshold)
        kind = "objects"
        if "panoptic_seg" in prediction or "instances" not in prediction:
            kind = "regions"
        sentence = f"{len(regions)} {kind}. {HINT}" if regions else f"No {kind} at this threshold."
        return render(prediction.image, regions), sentence

    def explain(
        self, model: str, prediction: Prediction | None, threshold: float, index: int
    ) -> tuple[Picture | None, str]:
        """Explain a region that was clicked.

        Args:
            model, prediction, threshold: as they were shown.
            index: of the region.
        Returns: a picture and its numbers, or None and a sentence that says why there is none.
        """
        regions: list[Region] = [] if prediction is None else regions_of(prediction, threshold)
        if prediction is None or not 0 <= index < len(regions):
            return None, "Click an object of the picture."
        region = regions[index]
        try:
            with self._lock:
                explanation = why_box(
                    self.predictor(model), prediction.image, region.box, region.name
                )
            return figure_picture(explanation.figure()), explanation.table()
        except (OSError, ValueError) as error:
            return None, _sentence(error)


def _sentence(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split())


def _named(models: Sequence[str | Path]) -> dict[str, Path]:
    """Return models by name: of their folder, or their whole path where names repeat."""
    if not models:
        raise ValueError("No model: give the folder of a run, or a checkpoint.")
    paths = [Path(model) for model in models]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist: give the folder of a run, or a checkpoint.")
    names = [path.resolve().name for path in paths]
    return {
        str(path) if names.count(name) > 1 else name: path
        for path, name in zip(paths, names, strict=True)
    }


def require_gradio() -> Any:
    """Return Gradio, set up to ask nobody. Raises: ImportError with the command that installs it.

    An environment variable that the user has set is kept, except those that would share the page.
    """
    os.environ.update(OFFLINE)
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            "The web page needs Gradio: pip install 'focalnet_det[serve]', or pip install gradio."
        ) from error
    return gradio


def build_page(app: App) -> Any:
    """Build the page of an app, a ``gradio.Blocks``."""
    gradio = require_gradio()
    names = list(app.paths)
    with gradio.Blocks(title="focalnet_det", analytics_enabled=False) as page:
        gradio.Markdown("## focalnet_det")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                file = gradio.File(label="Image", type="filepath", elem_id="image", height=140)
                model = gradio.Dropdown(names, value=names[0], label="Model", elem_id="model")
                threshold = gradio.Slider(
                    0, 1, value=0.5, step=0.01, label="Least score", elem_id="threshold"
                )
                message = gradio.Markdown(elem_id="message")
            with gradio.Column(scale=3):
                view = gradio.HTML(
                    EMPTY, css_template=STYLE, js_on_load=CLICKS, elem_id="view", padding=False
                )
        with gradio.Row():
            picture = gradio.Image(
                label="What the backbone draws on", interactive=False, format="png", scale=3,
                elem_id="modulation", buttons=["download", "fullscreen"],
            )  # fmt: skip
            numbers = gradio.Textbox(
                label="Numbers",
                lines=18,
                max_lines=40,
                elem_id="numbers",
                interactive=False,
                scale=2,
            )
        _connect(app, gradio, (model, file, threshold), (view, message), (picture, numbers))
    return page


def _connect(
    app: App,
    gradio: Any,
    inputs: tuple[Any, Any, Any],
    shown: tuple[Any, Any],
    explained: tuple[Any, Any],
) -> None:
    """Connect the parts of the page with the functions of an app.

    Args:
        inputs: model, file and threshold.
        shown: picture with regions, and sentence.
        explained: picture and numbers.
    """
    model, file, threshold = inputs
    state = gradio.State(None)

    def predict(chosen: str, path: str | None, least: float) -> tuple[Any, ...]:
        prediction, problem = app.predict(chosen, path)
        html, sentence = app.show(prediction, least)
        return prediction, html, problem or sentence, None, ""

    def explain(
        chosen: str, prediction: Any, least: float, event: Any
    ) -> tuple[Picture | None, str]:
        return app.explain(chosen, prediction, least, int(event.index))

    # Gradio passes events to arguments of this type, which exists only where it is installed.
    explain.__annotations__["event"] = gradio.EventData
    private = {"api_visibility": "private"}
    for changed in (file, model):
        changed.change(predict, [*inputs], [state, *shown, *explained], **private)
    # While the slider moves, only its last place counts.
    last = {"trigger_mode": "always_last", "show_progress": "hidden"}
    threshold.change(app.show, [state, threshold], [*shown], **last, **private)
    shown[0].select(explain, [model, state, threshold], [*explained], **private)


def launch(app: App, *, port: int = PORT, wait: bool = True) -> str:
    """Serve the page on the loopback address.

    Args:
        app: see :class:`App`.
        port: 0 takes a free one.
        wait: return only after Ctrl-C; otherwise the page ends with the process.
    Returns: the address.
    Raises: OSError if the port is in use.
    """
    page = build_page(app)
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port or _free_port(),
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            css="#numbers textarea { font: 12px monospace; white-space: pre; }",
        )
    except OSError as error:
        raise OSError(f"Port {port} is in use: choose another one with --port.") from error
    print(f"Serving {', '.join(app.paths)} at {address} (this machine alone). Ctrl-C ends it.")
    if wait:
        page.block_thread()
    return str(address)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the models that a command line names, until Ctrl-C.

    Args:
        argv: arguments; None for those of the process.
    Raises: ValueError, OSError or ImportError with a message for the user.
    """
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Serve trained models as a web page on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="RUN", help="folders of runs, or checkpoints")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default: {PORT}")
    parser.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    args = parser.parse_args(argv)
    launch(App(args.models, device=args.device), port=args.port)


if __name__ == "__main__":
    from ..errors import one_line_errors

    with one_line_errors():
        main()
