"""The folder of a Python package."""

from __future__ import annotations

import json
import json.decoder
import os

from graphcomp.system.files import folder_of


def test_file_names_of_code_begin_with_the_folder_of_the_package():
    folder = folder_of(json)
    assert folder.endswith(os.sep) and json.decoder.JSONDecoder.decode.__code__.co_filename.startswith(folder)
    assert folder_of(json.decoder) == folder
