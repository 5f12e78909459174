"""What every training program needs and no paper describes: options, run folders, processes, rows, curves."""
