"""What everything else may use, and what uses nothing of ours: flags, devices, processes, files, ranks."""
