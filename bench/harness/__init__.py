"""What the questions in ``bench/`` share: contenders, measuring, intervals, result files."""
