"""The beginning of a script for a process in which sdllava is not installed."""

REFUSE_PACKAGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sdllava":
            raise ModuleNotFoundError("sdllava is not installed")
sys.meta_path.insert(0, Refuse())
"""
