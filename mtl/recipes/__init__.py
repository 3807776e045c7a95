"""Whole systems on the framework's public points: named in the YAML as built-ins are."""
