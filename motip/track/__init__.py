"""The runtime tracker: detections in, tracks out; torch, numpy and scipy only."""
