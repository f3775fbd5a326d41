// A stand-in for libcuda.so.1, built by the tests. It keeps the driver's rules as far as llmc's runtime relies on them, and breaks
// them where a test asks for it. Device memory is one shared file; streams put off everything until somebody waits for it, so that
// a buffer that is used too early shows; kernels are run by a Python process (stand_in_server.py) that maps the same memory.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500,
       ILLEGAL_ADDRESS = 700, UNKNOWN = 999 };
enum { MAX_PARAMS = 128, MAX_ALLOCATIONS = 65536, POISON = 0xFF };

// --- knobs: how this driver is, and what goes wrong ------------------------------------------------------------------------------
static struct { const char* name; long value; } knobs[] = {
    {"init", 0},           // what cuInit gives
    {"driver", 13000},     // cuDriverGetVersion
    {"gpus", 1},
    {"capability", 90},
    {"shared", 232448},    // bytes of a block, opted in
    {"memory", 1L << 30},  // bytes of the GPU
    {"oom_at", 0},         // the n-th cuMemAlloc finds no memory, from 1
    {"pinned_oom_at", 0},  // the n-th cuMemHostAlloc
    {"misalign_at", 0},    // the n-th cuMemAlloc gives an address 16 bytes off
    {"illegal_at", 0},     // the n-th kernel accesses memory it must not
    {"order", 0},          // not 0: seed of a random order of a graph's nodes that its edges allow
    {"launches", 0}, {"allocations", 0}, {"pinned_allocations", 0}, {"live", 0}, {"bytes_out", 0}, {"fed", 0}, {"graph_launches", 0}, {"graphs", 0}, {"modules", 0},  // counted
};
static long* knob(const char* name) {
    for (size_t i = 0; i < sizeof knobs / sizeof *knobs; i++)
        if (!strcmp(knobs[i].name, name)) return &knobs[i].value;
    fprintf(stderr, "stand-in: no knob %s\n", name);
    abort();
}
void stand_in_set(const char* name, long value) { *knob(name) = value; }
long stand_in_get(const char* name) { return *knob(name); }

static char server_path[108];
void stand_in_server(const char* path) { snprintf(server_path, sizeof server_path, "%s", path); }

__attribute__((constructor)) static void from_environment(void) {  // for processes that a test cannot reach: "memory=1000,oom_at=3"
    const char* path = getenv("STAND_IN_SERVER");
    if (path) stand_in_server(path);
    char* text = getenv("STAND_IN") ? strdup(getenv("STAND_IN")) : NULL;
    for (char* part = text ? strtok(text, ",") : NULL; part; part = strtok(NULL, ",")) {
        char* value = strchr(part, '=');
        if (!value) abort();
        *value = 0;
        stand_in_set(part, atol(value + 1));
    }
    free(text);
}

// --- state -----------------------------------------------------------------------------------------------------------------------
typedef struct { uint64_t start; size_t size; } Range;
typedef struct { uint32_t module; char entry[512]; int count; size_t size[MAX_PARAMS]; int shared_limit; } Function;
typedef struct { uint32_t id; int count; Function* functions; } Module;
typedef struct { Function* function; uint32_t grid[3], block[3], shared, cluster[3]; unsigned char* params; int count; int* before; } Node;
typedef struct Graph { int count, room; Node** nodes; int executable; } Graph;
typedef struct Op { int kind; uint64_t device; unsigned char* host; size_t size; int value; Graph* graph; struct Event* event; uint64_t source; struct Op* next; } Op;
enum { COPY_IN, COPY_OUT, COPY, FILL, LAUNCH, MARK };
typedef struct { Op *first, **last; } Stream;
typedef struct Event { Stream* stream; long waits; } Event;  // waits: marks of it that no stream has come to
typedef struct { void* func; unsigned grid[3], block[3], shared; void** params; void** extra; void* kern; void* ctx; } NodeParams;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialized, lost, connection = -1, memory_fd = -1;
static __thread void* current;
static unsigned char* memory;
static size_t top;
static Range ranges[MAX_ALLOCATIONS], pinned[MAX_ALLOCATIONS];
static int num_ranges, num_pinned;

static size_t extent(Range* list, int count, uint64_t address) {  // bytes from an address to the end of what it lies in
    for (int i = 0; i < count; i++)
        if (address >= list[i].start && address < list[i].start + list[i].size) return list[i].start + list[i].size - address;
    return 0;
}
static int drop(Range* list, int* count, uint64_t start) {
    for (int i = 0; i < *count; i++)
        if (list[i].start == start) { list[i] = list[--*count]; return 1; }
    return 0;
}

#define ENTER if (!initialized) return NOT_INITIALIZED; if (lost) return lost; if (!current) return INVALID_CONTEXT; pthread_mutex_lock(&lock);
#define LEAVE(status) do { int result_ = (status); pthread_mutex_unlock(&lock); return result_; } while (0)

// --- the server that runs kernels ------------------------------------------------------------------------------------------------
static int all(int write_, void* data, size_t size) {
    for (char* at = data; size;) {
        ssize_t done = write_ ? write(connection, at, size) : read(connection, at, size);
        if (done <= 0) return 0;
        at += done, size -= done;
    }
    return 1;
}
static int say_hello(void) {  // memory's descriptor, where it lies here, and its size
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    memcpy(name.sun_path, server_path, sizeof name.sun_path);
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(connection, (struct sockaddr*)&name, sizeof name)) { perror("stand-in: connect"); return 0; }
    uint64_t facts[2] = {(uint64_t)memory, *knob("memory")};
    struct iovec part = {facts, sizeof facts};
    union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {0};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    struct cmsghdr* header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
    memcpy(CMSG_DATA(header), &memory_fd, sizeof(int));
    return sendmsg(connection, &message, 0) == sizeof facts;
}
static int ask(uint32_t kind, void* data, uint32_t size, unsigned char** answer, uint32_t* answer_size) {
    if (connection < 0 && !say_hello()) return UNKNOWN;
    uint32_t head[2] = {kind, size};
    if (!all(1, head, sizeof head) || !all(1, data, size) || !all(0, head, sizeof head)) return UNKNOWN;
    *answer = malloc(head[1] + 1);
    *answer_size = head[1];
    return all(0, *answer, head[1]) ? (int)head[0] : UNKNOWN;
}

static int run_node(Node* node) {
    if (++*knob("launches") == *knob("illegal_at")) return ILLEGAL_ADDRESS;
    unsigned char buffer[16384];
    size_t at = 0;
#define PUT(data, size) do { memcpy(buffer + at, data, size); at += size; } while (0)
    uint32_t numbers[9] = {node->function->module, node->grid[0], node->grid[1], node->grid[2], node->block[0], node->block[1],
                           node->block[2], node->shared, strlen(node->function->entry)};
    PUT(numbers, sizeof numbers);
    PUT(node->function->entry, numbers[8]);
    unsigned char* value = node->params;
    for (int i = 0; i < node->function->count; i++) {
        uint32_t size = node->function->size[i];
        uint64_t address = 0, rest;
        if (size == 8) memcpy(&address, value, 8);
        rest = extent(ranges, num_ranges, address);
        PUT(&size, 4); PUT(&rest, 8); PUT(value, size);
        value += size;
    }
    unsigned char* answer = NULL;
    uint32_t size;
    int status = ask(2, buffer, at, &answer, &size);
    free(answer);
    return status;
}
static int run_graph(Graph* graph) {
    char* done = calloc(graph->count + 1, 1);
    unsigned seed = *knob("order");
    int status = OK;
    for (int left = graph->count; left && !status; left--) {
        int ready[65536], count = 0;
        for (int i = 0; i < graph->count && (seed || !count); i++) {
            int waits = done[i];
            for (int j = 0; j < graph->nodes[i]->count; j++) waits |= !done[graph->nodes[i]->before[j]];
            if (!waits) ready[count++] = i;
        }
        int next = ready[seed ? rand_r(&seed) % count : 0];
        status = run_node(graph->nodes[next]);
        done[next] = 1;
    }
    free(done);
    return status;
}
static int run_until(Stream* stream, Event* event) {  // everything put off so far, or up to an event
    while (stream->first && !lost && (!event || event->waits)) {
        Op* op = stream->first;
        switch (op->kind) {
            case COPY_IN: memcpy((void*)op->device, op->host, op->size); break;
            case COPY_OUT: memcpy(op->host, (void*)op->device, op->size); break;
            case COPY: memcpy((void*)op->device, (void*)op->source, op->size); break;
            case MARK: op->event->waits--; break;
            case FILL: memset((void*)op->device, op->value, op->size); break;
            case LAUNCH: lost = run_graph(op->graph); break;
        }
        if (!(stream->first = op->next)) stream->last = &stream->first;
        free(op);
    }
    return lost;
}
static int run_stream(Stream* stream) { return run_until(stream, NULL); }
static int put(Stream* stream, Op op) {
    if (!stream) return INVALID_VALUE;
    *(*stream->last = malloc(sizeof(Op))) = op;
    stream->last = &(*stream->last)->next;
    return OK;
}

// --- start, device, context ------------------------------------------------------------------------------------------------------
int cuInit(unsigned flags) {
    int status = *knob("init");
    if (!status && !flags) initialized = 1;
    return status;
}
int cuDriverGetVersion(int* version) { *version = *knob("driver"); return OK; }
int cuGetErrorName(int status, const char** name) {
    *name = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : status == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : status == 100 ? "CUDA_ERROR_NO_DEVICE" : status == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : status == INVALID_IMAGE
          ? "CUDA_ERROR_INVALID_IMAGE" : status == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : status == 719 ? "CUDA_ERROR_LAUNCH_FAILED"
          : status == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_UNKNOWN";
    return OK;
}
int cuDeviceGetCount(int* count) { *count = *knob("gpus"); return initialized ? OK : NOT_INITIALIZED; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal < *knob("gpus") ? OK : 101; }
int cuDeviceGetName(char* name, int size, int device) { return device ? 101 : (snprintf(name, size, "stand-in"), OK); }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    long capability = *knob("capability");
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 97 ? *knob("shared") : attribute == 16 ? 132 : -1;
    return device || *value < 0 ? INVALID_VALUE : OK;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    pthread_mutex_lock(&lock);
    if (memory_fd < 0) {
        memory_fd = memfd_create("stand-in memory", MFD_CLOEXEC);
        if (memory_fd < 0 || ftruncate(memory_fd, *knob("memory"))) abort();
        memory = mmap(NULL, *knob("memory"), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory_fd, 0);
        if (memory == MAP_FAILED) abort();
    }
    *context = &memory_fd;
    LEAVE(device ? INVALID_VALUE : OK);
}
int cuDevicePrimaryCtxRelease_v2(int device) { return lost ? lost : device ? INVALID_VALUE : OK; }
int cuCtxSetCurrent(void* context) { current = context; return lost; }

// --- memory ----------------------------------------------------------------------------------------------------------------------
int cuMemGetInfo_v2(size_t* free_, size_t* total) { ENTER *free_ = *knob("memory") - *knob("live"); *total = *knob("memory"); LEAVE(OK); }
int cuMemAlloc_v2(uint64_t* address, size_t size) {
    ENTER
    long number = ++*knob("allocations");
    size_t room = (size + 511) / 512 * 512 + 512;  // a gap nobody has, so that writing past an end is seen by nobody else
    if (number == *knob("oom_at") || !size || top + room > (size_t)*knob("memory") || num_ranges == MAX_ALLOCATIONS) LEAVE(OUT_OF_MEMORY);
    *address = (uint64_t)memory + top + (number == *knob("misalign_at") ? 16 : 0);
    memset(memory + top, POISON, room);
    top += room;
    ranges[num_ranges++] = (Range){*address, size};
    *knob("live") += room;
    LEAVE(OK);
}
int cuMemFree_v2(uint64_t address) {  // its addresses are not given again
    ENTER
    size_t size = extent(ranges, num_ranges, address);
    if (!drop(ranges, &num_ranges, address)) LEAVE(INVALID_VALUE);
    *knob("live") -= (size + 511) / 512 * 512 + 512;
    memset((void*)address, POISON, size);
    LEAVE(OK);
}
int cuMemHostAlloc(void** address, size_t size, unsigned flags) {
    ENTER
    if (++*knob("pinned_allocations") == *knob("pinned_oom_at") || flags || posix_memalign(address, 4096, size)) LEAVE(OUT_OF_MEMORY);
    memset(*address, POISON, size);
    pinned[num_pinned++] = (Range){(uint64_t)*address, size};
    LEAVE(OK);
}
int cuMemFreeHost(void* address) {
    ENTER
    if (!drop(pinned, &num_pinned, (uint64_t)address)) LEAVE(INVALID_VALUE);
    free(address);
    LEAVE(OK);
}
static int copy(int kind, uint64_t device, void* host, size_t size, Stream* stream) {  // only from and to pinned memory, as llmc promises
    if (extent(ranges, num_ranges, device) < size || extent(pinned, num_pinned, (uint64_t)host) < size) return INVALID_VALUE;
    if (kind == COPY_OUT) *knob("bytes_out") += size;
    return put(stream, (Op){.kind = kind, .device = device, .host = host, .size = size});
}
int cuMemcpyHtoDAsync_v2(uint64_t device, void* host, size_t size, Stream* stream) { ENTER LEAVE(copy(COPY_IN, device, host, size, stream)); }
int cuMemcpyDtoHAsync_v2(void* host, uint64_t device, size_t size, Stream* stream) { ENTER LEAVE(copy(COPY_OUT, device, host, size, stream)); }
int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t size, Stream* stream) {
    ENTER
    if (extent(ranges, num_ranges, target) < size || extent(ranges, num_ranges, source) < size) LEAVE(INVALID_VALUE);
    ++*knob("fed");
    LEAVE(put(stream, (Op){.kind = COPY, .device = target, .source = source, .size = size}));
}
int cuMemsetD8Async(uint64_t device, unsigned char value, size_t size, Stream* stream) {
    ENTER
    if (extent(ranges, num_ranges, device) < size) LEAVE(INVALID_VALUE);
    LEAVE(put(stream, (Op){.kind = FILL, .device = device, .value = value, .size = size}));
}

// --- streams and events ----------------------------------------------------------------------------------------------------------
int cuStreamCreate(Stream** stream, unsigned flags) {
    ENTER
    *stream = calloc(1, sizeof(Stream));
    (*stream)->last = &(*stream)->first;
    LEAVE(flags == 1 ? OK : INVALID_VALUE);
}
int cuStreamSynchronize(Stream* stream) { ENTER LEAVE(run_stream(stream)); }
int cuStreamDestroy_v2(Stream* stream) { ENTER int status = run_stream(stream); free(stream); LEAVE(status); }
int cuEventCreate(Event** event, unsigned flags) { ENTER *event = calloc(1, sizeof(Event)); LEAVE(flags == 2 ? OK : INVALID_VALUE); }
int cuEventRecord(Event* event, Stream* stream) {
    ENTER
    event->stream = stream, event->waits++;
    LEAVE(put(stream, (Op){.kind = MARK, .event = event}));
}
int cuEventSynchronize(Event* event) { ENTER LEAVE(event->stream ? run_until(event->stream, event) : OK); }
int cuEventDestroy_v2(Event* event) { ENTER free(event); LEAVE(OK); }

// --- modules and functions -------------------------------------------------------------------------------------------------------
static uint64_t number(const unsigned char* at, int bytes) { uint64_t value = 0; memcpy(&value, at, bytes); return value; }
static size_t image_size(const unsigned char* image) {  // an ELF file says where its parts end
    size_t start = number(image + 40, 8), count = number(image + 60, 2), end = start + 64 * count;
    for (size_t i = 0; i < count; i++) {
        const unsigned char* header = image + start + 64 * i;
        size_t stop = number(header + 24, 8) + number(header + 32, 8);
        if (number(header + 4, 4) != 8 && stop > end) end = stop;
    }
    size_t segments = number(image + 32, 8) + number(image + 54, 2) * number(image + 56, 2);
    return segments > end ? segments : end;
}
int cuModuleLoadData(Module** module, unsigned char* image) {
    ENTER
    if (memcmp(image, "\177ELF", 4)) LEAVE(INVALID_IMAGE);
    unsigned char *answer = NULL, *at;
    uint32_t size;
    int status = ask(1, image, image_size(image), &answer, &size);
    if (!status) {
        ++*knob("modules");
        at = answer;
        Module* made = *module = calloc(1, sizeof(Module));
        made->id = number(at, 4), made->count = number(at + 4, 4), at += 8;
        made->functions = calloc(made->count, sizeof(Function));
        for (Function* f = made->functions; f < made->functions + made->count; f++) {
            uint32_t length = number(at, 4);
            memcpy(f->entry, at + 4, length), at += 4 + length;
            f->module = made->id, f->shared_limit = 48 * 1024, f->count = number(at, 4), at += 4;
            for (int i = 0; i < f->count; i++, at += 4) f->size[i] = number(at, 4);
        }
    }
    free(answer);
    LEAVE(status);
}
int cuModuleUnload(Module* module) { ENTER --*knob("modules"); free(module->functions); free(module); LEAVE(OK); }
int cuModuleGetFunction(Function** function, Module* module, const char* entry) {
    ENTER
    for (Function* f = module->functions; f < module->functions + module->count; f++)
        if (!strcmp(f->entry, entry)) { *function = f; LEAVE(OK); }
    LEAVE(NOT_FOUND);
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    ENTER
    if (attribute == 8 && value <= *knob("shared")) { function->shared_limit = value; LEAVE(OK); }
    LEAVE(attribute == 14 ? OK : INVALID_VALUE);
}

// --- graphs ----------------------------------------------------------------------------------------------------------------------
int cuGraphCreate(Graph** graph, unsigned flags) { ENTER ++*knob("graphs"); *graph = calloc(1, sizeof(Graph)); LEAVE(flags ? INVALID_VALUE : OK); }
static int index_of(Graph* graph, Node* node) {
    for (int i = graph->count - 1; i >= 0; i--)
        if (graph->nodes[i] == node) return i;
    return -1;
}
int cuGraphAddKernelNode_v2(Node** out, Graph* graph, Node** before, size_t count, NodeParams* given) {
    ENTER
    Function* function = given->func;
    for (int i = 0; i < 3; i++)
        if (!given->grid[i] || !given->block[i]) LEAVE(INVALID_VALUE);
    if ((long)given->shared > function->shared_limit || given->extra || given->kern || given->ctx) LEAVE(INVALID_VALUE);
    Node* node = *out = calloc(1, sizeof(Node));
    node->function = function, node->shared = given->shared, node->count = count;
    memcpy(node->grid, given->grid, 12), memcpy(node->block, given->block, 12);
    node->before = malloc(sizeof(int) * (count + 1));
    for (size_t i = 0; i < count; i++)
        if ((node->before[i] = index_of(graph, before[i])) < 0) LEAVE(INVALID_VALUE);
    size_t total = 0;
    for (int i = 0; i < function->count; i++) total += function->size[i];
    unsigned char* at = node->params = malloc(total + 1);
    for (int i = 0; i < function->count; i++) memcpy(at, given->params[i], function->size[i]), at += function->size[i];
    if (graph->count == graph->room) graph->nodes = realloc(graph->nodes, sizeof(Node*) * (graph->room = 2 * graph->room + 16));
    graph->nodes[graph->count++] = node;
    LEAVE(OK);
}
int cuGraphKernelNodeSetAttribute(Node* node, int attribute, void* value) {
    ENTER
    if (attribute != 4) LEAVE(INVALID_VALUE);
    memcpy(node->cluster, value, 12);
    LEAVE(node->grid[0] % node->cluster[0] ? INVALID_VALUE : OK);
}
static void destroy(Graph* graph) {
    for (int i = 0; i < graph->count; i++) free(graph->nodes[i]->params), free(graph->nodes[i]->before), free(graph->nodes[i]);
    free(graph->nodes);
    free(graph);
}
int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, uint64_t flags) {  // a copy: the graph may go, or change
    ENTER
    ++*knob("graphs");
    Graph* made = *executable = calloc(1, sizeof(Graph));
    made->executable = 1, made->count = graph->count, made->nodes = malloc(sizeof(Node*) * (graph->count + 1));
    for (int i = 0; i < graph->count; i++) {
        Node* copied = made->nodes[i] = malloc(sizeof(Node));
        *copied = *graph->nodes[i];
        size_t total = 0;
        for (int j = 0; j < copied->function->count; j++) total += copied->function->size[j];
        copied->params = memcpy(malloc(total + 1), copied->params, total);
        copied->before = memcpy(malloc(sizeof(int) * (copied->count + 1)), copied->before, sizeof(int) * copied->count);
    }
    LEAVE(flags ? INVALID_VALUE : OK);
}
int cuGraphUpload(Graph* executable, Stream* stream) { ENTER LEAVE(executable->executable && stream ? OK : INVALID_VALUE); }
int cuGraphLaunch(Graph* executable, Stream* stream) {
    ENTER
    if (!executable->executable) LEAVE(INVALID_VALUE);
    ++*knob("graph_launches");
    LEAVE(put(stream, (Op){.kind = LAUNCH, .graph = executable}));
}
int cuGraphDestroy(Graph* graph) { ENTER --*knob("graphs"); destroy(graph); LEAVE(OK); }
int cuGraphExecDestroy(Graph* graph) { ENTER --*knob("graphs"); destroy(graph); LEAVE(OK); }
