"""Where every checkpoint came from: runs, data, parents and scores in MLflow, which is spoken to in this room only."""

from motip.lineage.null import NullLineage
from motip.lineage.provenance import provenance
from motip.lineage.recorder import Lineage
from motip.lineage.steps import DataUsed, LineageStep
from motip.lineage.verify import FileCheck

__all__ = ["DataUsed", "FileCheck", "Lineage", "LineageStep", "NullLineage", "provenance"]
