"""Lineage of checkpoints in MLflow: runs, datasets, parents and scores. The only package that imports MLflow."""

from motip.lineage.provenance import provenance
from motip.lineage.runs import Lineage
from motip.lineage.steps import DataUsed, LineageStep
from motip.lineage.verify import FileCheck

__all__ = ["DataUsed", "FileCheck", "Lineage", "LineageStep", "provenance"]
