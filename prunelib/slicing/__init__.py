"""How wide is a layer?"""
