"""The order of the stages: save (capture_stage, persist, commit) and restore, mirror images."""
