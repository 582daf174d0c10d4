"""Tracking: detector and ID-decoder outputs to tracks; imports only torch, torchvision, numpy and scipy."""
