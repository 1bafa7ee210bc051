"""Video clips: films, folders of frames, DICOM cine."""

from meristem.modalities.video.options import VideoOptions, VideoViewOptions
from meristem.modalities.video.video import Video

__all__ = ["Video", "VideoOptions", "VideoViewOptions"]
