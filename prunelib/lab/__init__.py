"""Where is a number kept, and what made it?"""
