"""Which tokens does a number stand on?"""
