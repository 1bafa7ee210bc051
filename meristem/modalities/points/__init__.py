"""Point clouds: shapes, rooms and LiDAR scans, positions in metres."""

from meristem.modalities.points.points import Points

__all__ = ["Points"]
