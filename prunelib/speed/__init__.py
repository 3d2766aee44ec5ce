"""How fast is a model, beside the limit?"""
