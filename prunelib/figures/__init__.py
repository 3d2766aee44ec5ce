"""How does a figure look?"""
