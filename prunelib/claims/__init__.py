"""What does a paper say, and what do the tables say to it?"""
