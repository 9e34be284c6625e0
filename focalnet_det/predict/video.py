"""Read and write videos with PyAV, an optional library."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic import replacing

Frame = NDArray[np.uint8]
# H.264 where this build of FFmpeg has it.
CODECS = ("libx264", "mpeg4")
DEFAULT_RATE = 25


def require_av() -> Any:
    """Return PyAV. Raises: ImportError with the command that installs it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("Videos need PyAV: pip install av.") from error
    return av


def open_video(path: str | Path, *, format_name: str | None = None) -> tuple[Fraction, Any]:
    """Open a video, or a camera with ``format_name`` "v4l2".

    Returns: frames per second, and an iterator of frames, (H, W, 3), uint8, RGB.
    Raises: ValueError if it cannot be read or has no picture.
    """
    av = require_av()
    try:
        container = av.open(str(path), format=format_name)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"Cannot read video {path}: {error}.") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} has no video stream.")
    rate = container.streams.video[0].average_rate or Fraction(DEFAULT_RATE)
    return rate, _frames(container, path)


def _frames(container: Any, path: str | Path) -> Iterator[Frame]:
    with container:
        try:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
        except require_av().FFmpegError as error:
            raise ValueError(f"Cannot decode video {path}: {error}.") from error


class VideoWriter:
    """Writes an MP4 file that is whole or absent: it appears when the block ends without error.

    Frames are fitted to the first one, whose sides are made even, as encoders need.

    Args:
        path: of the file.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path = path
        self.rate = rate
        self._stack = contextlib.ExitStack()
        self._stream: Any = None

    def __enter__(self) -> "VideoWriter":
        """Open a temporary file beside the path."""
        av = require_av()
        temporary = self._stack.enter_context(replacing(self.path, durable=False))
        self._container = self._stack.enter_context(av.open(str(temporary), "w", format="mp4"))
        return self

    def __exit__(self, *error: Any) -> None:
        """Finish the file; after an error, remove it."""
        if self._stream is not None and error[0] is None:
            self._container.mux(self._stream.encode())
        self._stack.__exit__(*error)

    def add(self, image: Frame) -> None:
        """Add a frame, (H, W, 3), uint8, RGB."""
        av = require_av()
        if self._stream is None:
            codec = next(name for name in CODECS if name in av.codecs_available)
            self._stream = self._container.add_stream(codec, rate=self.rate)
            height, width = image.shape[:2]
            self._stream.width, self._stream.height = width + width % 2, height + height % 2
            self._stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        fitted = frame.reformat(width=self._stream.width, height=self._stream.height)
        self._container.mux(self._stream.encode(fitted))
