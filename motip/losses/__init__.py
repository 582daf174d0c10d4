"""Detection and ID losses; imports only torch, numpy and scipy."""
