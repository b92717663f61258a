"""Operations on compressed caches: a folder each, with its public function, its reference and its device kernels."""
