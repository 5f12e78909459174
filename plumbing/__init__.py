"""What every training program needs and no paper describes: options, processes, run folders, files, tables, curves."""
