// Functions compiled once more for wider vectors, chosen when the library is loaded.
#pragma once

// For functions that are no templates; what they call has to be inlined to be wide too. Sums may
// differ in their last bits from one kind of CPU to another, as those of the products do.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define SHAMPOO_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SHAMPOO_WIDE
#endif

// A template that such a function calls.
#define SHAMPOO_INLINED inline __attribute__((always_inline))
