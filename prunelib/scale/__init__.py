"""What is larger than memory, or runs in more than one process?"""
