// All files of the rows of the linear head step, for for_each_isa.h.

#include "divergence_terms.h"
#include "geodesic_terms.h"
#include "products.h"

#include "head_rows.h"

#include "head_gradients.h"
