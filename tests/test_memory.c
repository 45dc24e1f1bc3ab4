#include "test.h"
typedef struct header { size_t size; uint32_t magic, pad; } header;
static void *a(void *user, size_t size) { test_heap *heap = (test_heap *)user; header *h; heap->count++; if (size > heap->largest) heap->largest = size;
  if (heap->fail_at && (heap->count == heap->fail_at || (heap->fail_forever && heap->count > heap->fail_at))) return NULL;
  h = (header *)malloc(sizeof *h + size); if (!h) return NULL; h->magic = 0xABCD; heap->live++; return h + 1; }
static void f(void *user, void *p) { test_heap *heap = (test_heap *)user; header *h = (header *)p - 1; if (h->magic != 0xABCD) heap->bad++; h->magic = 0; heap->live--; free(h); }
tfm_allocator test_allocator(test_heap *heap) { tfm_allocator x; x.allocate = a; x.release = f; x.user = heap; return x; }
void test_memory(void);
void test_memory(void) {}
