/* A guest's program that keeps its disk busy and checks every answer: a thread a processor, each with a context of Linux AIO
 * (io_submit(2)), so many requests under way and a part of the disk of its own. As tests/src/vhost/model.rs has it, each
 * block has a version that every write raises, no two writes of a block are under way at once, and a read may see any
 * version from the last known to be there when it began to the newest begun when it ended.
 *
 *   verifier DISK DEPTH [OTHER]    talks on the first serial port; /dev/OTHER is a disk that becomes larger meanwhile
 *
 *   PRESTAGE alive                             the disk is written once and the load begins
 *   count → PRESTAGE verified reads=N writes=N gap_ms=N errors=N     so far, and goes on; gap_ms: the longest time in which
 *                                              no request of a thread with requests under way was answered, since the last
 *                                              count; errors: lines of the kernel's log that tell of failed I/O
 *   size → PRESTAGE sized bytes=N told=N       of OTHER: its size, and lines of the kernel's log that tell of a new one
 *   last SEED → PRESTAGE ended bytes=N         OTHER's last block is written (word i is SEED + i), synced and read back; bytes:
 *                                              where it ends
 *   end → PRESTAGE verified …                  lets all end, reads everything back, powers off
 *   PRESTAGE failed WHY                        the first answer that may not be; powers off
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define WORDS (BLOCK / 8)
#define MOST 8 /* blocks of a request */
#define DEPTH_MAX 64
#define THREADS_MAX 16

static void power_off(void) {
  fflush(stdout);
  tcdrain(1);
  sync();
  reboot(RB_POWER_OFF);
  _exit(1);
}

static void fail(const char *format, ...) {
  static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&once); /* never given back: the first failure is the one that is told */
  va_list words;
  va_start(words, format);
  printf("PRESTAGE failed ");
  vprintf(format, words);
  printf("\n");
  power_off();
}

static uint64_t now_ms(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (uint64_t)at.tv_sec * 1000 + (uint64_t)at.tv_nsec / 1000000;
}

/* SplitMix64 (Steele, Lea, Flood 2014). */
static uint64_t draw(uint64_t *state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static uint64_t word(uint64_t block, unsigned at, uint32_t version) {
  uint64_t state = (block * WORDS + at) << 32 | version;
  return draw(&state) << 32 | version;
}

struct request {
  struct iocb iocb;
  unsigned char *data;
  uint64_t first;
  unsigned blocks;
  int busy, writes;
  uint32_t oldest[MOST];
};

struct part {
  pthread_t thread;
  int disk, cpu;
  unsigned depth;
  uint64_t first, blocks; /* of the disk */
  uint32_t *begun, *known;
  unsigned char *writing;
  uint64_t random;
  aio_context_t context;
  struct request requests[DEPTH_MAX];
  _Atomic uint64_t reads, writes, gap_ms;
};

static atomic_int ending;

static void ask(struct part *part, struct request *request, int writes, uint64_t first, unsigned blocks) {
  for (unsigned i = 0; i < blocks; i++) {
    uint64_t at = first + i;
    if (writes) {
      part->writing[at] = 1;
      part->begun[at]++;
      uint64_t *words = (uint64_t *)(request->data + i * BLOCK);
      for (unsigned w = 0; w < WORDS; w++) words[w] = word(part->first + at, w, part->begun[at]);
    } else {
      request->oldest[i] = part->known[at];
    }
  }
  request->busy = 1;
  request->writes = writes;
  request->first = first;
  request->blocks = blocks;
  memset(&request->iocb, 0, sizeof request->iocb);
  request->iocb.aio_data = (uint64_t)(uintptr_t)request;
  request->iocb.aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
  request->iocb.aio_fildes = (uint32_t)part->disk;
  request->iocb.aio_buf = (uint64_t)(uintptr_t)request->data;
  request->iocb.aio_nbytes = (uint64_t)blocks * BLOCK;
  request->iocb.aio_offset = (int64_t)((part->first + first) * BLOCK);
  struct iocb *list[1] = {&request->iocb};
  long done;
  do done = syscall(SYS_io_submit, part->context, 1L, list);
  while (done < 0 && (errno == EINTR || errno == EAGAIN));
  if (done != 1) fail("io_submit: %s", strerror(errno));
}

static void check(struct part *part, const struct request *request) {
  for (unsigned i = 0; i < request->blocks; i++) {
    uint64_t at = request->first + i, block = part->first + at;
    const uint64_t *words = (const uint64_t *)(request->data + i * BLOCK);
    uint32_t seen = UINT32_MAX;
    for (unsigned w = 0; w < WORDS; w++) {
      uint32_t version = (uint32_t)words[w];
      if (words[w] != word(block, w, version))
        fail("block %llu: word %u is %llx, which no write wrote there", (unsigned long long)block, w,
             (unsigned long long)words[w]);
      if (version < request->oldest[i] || version > part->begun[at])
        fail("block %llu: version %u, where %u was before and %u is the newest", (unsigned long long)block, version,
             request->oldest[i], part->begun[at]);
      if (version < seen) seen = version;
    }
    if (seen > part->known[at]) part->known[at] = seen;
  }
}

/* Takes answers, waiting for one at least. */
static void answers(struct part *part) {
  struct io_event events[DEPTH_MAX];
  uint64_t since = now_ms();
  long count;
  do count = syscall(SYS_io_getevents, part->context, 1L, (long)DEPTH_MAX, events, NULL);
  while (count < 0 && errno == EINTR);
  if (count < 1) fail("io_getevents: %s", strerror(errno));
  uint64_t gap = now_ms() - since;
  if (gap > part->gap_ms) part->gap_ms = gap;
  for (long i = 0; i < count; i++) {
    struct request *request = (struct request *)(uintptr_t)events[i].data;
    if (!request->busy) fail("block %llu: answered twice", (unsigned long long)(part->first + request->first));
    if (events[i].res != (int64_t)request->blocks * BLOCK)
      fail("%s of block %llu: %lld", request->writes ? "write" : "read",
           (unsigned long long)(part->first + request->first), (long long)events[i].res);
    if (request->writes) {
      for (unsigned b = 0; b < request->blocks; b++) {
        part->writing[request->first + b] = 0;
        part->known[request->first + b] = part->begun[request->first + b];
      }
      part->writes++;
    } else {
      check(part, request);
      part->reads++;
    }
    request->busy = 0;
  }
}

static unsigned busy(const struct part *part) {
  unsigned count = 0;
  for (unsigned i = 0; i < part->depth; i++) count += (unsigned)part->requests[i].busy;
  return count;
}

static struct request *idle(struct part *part) {
  for (unsigned i = 0; i < part->depth; i++)
    if (!part->requests[i].busy) return &part->requests[i];
  return NULL;
}

/* Every block once, in order. */
static void sweep(struct part *part, int writes) {
  for (uint64_t at = 0; at < part->blocks;) {
    struct request *request = idle(part);
    if (request == NULL) {
      answers(part);
      continue;
    }
    unsigned blocks = part->blocks - at < MOST ? (unsigned)(part->blocks - at) : MOST;
    ask(part, request, writes, at, blocks);
    at += blocks;
  }
  while (busy(part) > 0) answers(part);
}

static pthread_barrier_t begun;

static void *run(void *of) {
  struct part *part = of;
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(part->cpu, &cpus);
  if (sched_setaffinity(0, sizeof cpus, &cpus) != 0) fail("sched_setaffinity: %s", strerror(errno));
  if (syscall(SYS_io_setup, DEPTH_MAX, &part->context) != 0) fail("io_setup: %s", strerror(errno));
  for (unsigned i = 0; i < part->depth; i++)
    if (posix_memalign((void **)&part->requests[i].data, BLOCK, MOST * BLOCK) != 0) fail("no memory");
  sweep(part, 1);
  part->reads = part->writes = part->gap_ms = 0;
  pthread_barrier_wait(&begun);
  while (!ending) {
    struct request *request;
    while ((request = idle(part)) != NULL) {
      uint64_t dice = draw(&part->random);
      unsigned blocks = 1 + (unsigned)(dice >> 8) % MOST;
      /* half of them in a sixteenth: reads meet writes */
      uint64_t span = dice & 8 ? part->blocks : part->blocks / 16;
      uint64_t first = (dice >> 24) % (span - blocks);
      int writes = dice & 16 ? 1 : 0;
      for (unsigned i = 0; writes && i < blocks; i++)
        if (part->writing[first + i]) writes = 0;
      ask(part, request, writes, first, blocks);
    }
    answers(part);
  }
  while (busy(part) > 0) answers(part);
  sweep(part, 0);
  return NULL;
}

/* Calls `of` for each line of the kernel's log; its sum. */
static unsigned kernel_log(unsigned (*of)(const char *line)) {
  int log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
  if (log < 0) fail("/dev/kmsg: %s", strerror(errno));
  char line[8192];
  unsigned sum = 0;
  for (;;) {
    ssize_t length = read(log, line, sizeof line - 1);
    if (length < 0 && errno == EPIPE) continue; /* overwritten meanwhile: go on at the oldest */
    if (length <= 0) break;
    line[length] = 0;
    sum += of(line);
  }
  close(log);
  return sum;
}

/* Lines that tell of failed I/O, or of requests that took too long to be believed. */
static unsigned tells_of_error(const char *line) {
  static const char *const words[] = {"I/O error", "Buffer I/O", "blocked for more than", "virtio_blk", "critical target", "critical medium"};
  /* the driver's greeting has its name too */
  if (strstr(line, "logical blocks") != NULL || strstr(line, "queues") != NULL) return 0;
  for (unsigned i = 0; i < sizeof words / sizeof *words; i++) {
    if (strstr(line, words[i]) == NULL) continue;
    printf("PRESTAGE note %.120s\n", strchr(line, ';') ? strchr(line, ';') + 1 : line);
    return 1;
  }
  return 0;
}

static const char *other;

/* As the driver words it: "[vdb] new size: 98304 512-byte logical blocks (50.3 MB/48.0 MiB)". */
static unsigned tells_of_size(const char *line) {
  char words[64];
  snprintf(words, sizeof words, "[%s] new size:", other);
  return strstr(line, words) != NULL;
}

static uint64_t size_of_other(void) {
  char path[64];
  snprintf(path, sizeof path, "/sys/block/%s/size", other);
  FILE *file = fopen(path, "r");
  unsigned long long sectors = 0;
  if (file == NULL || fscanf(file, "%llu", &sectors) != 1) fail("%s: no number", path);
  fclose(file);
  return sectors * 512;
}

static void write_last(uint64_t seed) {
  char path[64];
  snprintf(path, sizeof path, "/dev/%s", other);
  uint64_t end = size_of_other();
  int disk = open(path, O_RDWR | O_DIRECT);
  uint64_t *written, *found;
  if (disk < 0) fail("%s: %s", path, strerror(errno));
  if (posix_memalign((void **)&written, BLOCK, BLOCK) != 0 || posix_memalign((void **)&found, BLOCK, BLOCK) != 0) fail("no memory");
  for (unsigned i = 0; i < WORDS; i++) written[i] = seed + i;
  memset(found, 0, BLOCK);
  off_t at = (off_t)(end - BLOCK);
  if (pwrite(disk, written, BLOCK, at) != BLOCK) fail("write of the last block of %s: %s", path, strerror(errno));
  if (fsync(disk) != 0) fail("fsync of %s: %s", path, strerror(errno));
  if (pread(disk, found, BLOCK, at) != BLOCK) fail("read of the last block of %s: %s", path, strerror(errno));
  if (memcmp(written, found, BLOCK) != 0) fail("the last block of %s is not what was written", path);
  close(disk);
  free(written);
  free(found);
  printf("PRESTAGE ended bytes=%llu\n", (unsigned long long)end);
}

static struct part parts[THREADS_MAX];

static void report(unsigned count) {
  uint64_t reads = 0, writes = 0, gap_ms = 0;
  for (unsigned i = 0; i < count; i++) {
    reads += parts[i].reads;
    writes += parts[i].writes;
    uint64_t gap = atomic_exchange(&parts[i].gap_ms, 0);
    if (gap > gap_ms) gap_ms = gap;
  }
  unsigned errors = kernel_log(tells_of_error);
  printf("PRESTAGE verified reads=%llu writes=%llu gap_ms=%llu errors=%u\n", (unsigned long long)reads,
         (unsigned long long)writes, (unsigned long long)gap_ms, errors);
}

int main(int arguments, char **argument) {
  int port = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
  struct termios raw;
  if (port >= 0 && tcgetattr(port, &raw) == 0) {
    cfmakeraw(&raw);
    tcsetattr(port, TCSANOW, &raw);
  }
  for (int fd = 0; port >= 0 && fd < 3; fd++) dup2(port, fd);
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (arguments != 3 && arguments != 4) fail("verifier DISK DEPTH [OTHER]");
  other = arguments == 4 ? argument[3] : NULL;
  unsigned depth = (unsigned)atoi(argument[2]);
  long cpus = sysconf(_SC_NPROCESSORS_ONLN);
  unsigned count = cpus < 1 ? 1 : cpus > THREADS_MAX ? THREADS_MAX : (unsigned)cpus;
  int disk = open(argument[1], O_RDWR | O_DIRECT);
  if (disk < 0) fail("%s: %s", argument[1], strerror(errno));
  uint64_t bytes = 0;
  if (ioctl(disk, BLKGETSIZE64, &bytes) != 0) fail("%s: %s", argument[1], strerror(errno));
  uint64_t each = bytes / BLOCK / count;
  if (depth < 1 || depth > DEPTH_MAX || each < 32 * MOST) fail("1 to %d requests, and a larger disk", DEPTH_MAX);
  pthread_barrier_init(&begun, NULL, count + 1);
  for (unsigned i = 0; i < count; i++) {
    struct part *part = &parts[i];
    part->disk = disk;
    part->cpu = (int)i;
    part->depth = depth;
    part->first = i * each;
    part->blocks = each;
    part->begun = calloc(each, sizeof *part->begun);
    part->known = calloc(each, sizeof *part->known);
    part->writing = calloc(each, 1);
    part->random = i + 1;
    if (part->begun == NULL || part->known == NULL || part->writing == NULL) fail("no memory");
    if (pthread_create(&part->thread, NULL, run, part) != 0) fail("no thread");
  }
  pthread_barrier_wait(&begun);
  printf("PRESTAGE alive\n");
  char line[32];
  while (fgets(line, sizeof line, stdin) != NULL && strncmp(line, "end", 3) != 0) {
    if (other != NULL && strncmp(line, "size", 4) == 0)
      printf("PRESTAGE sized bytes=%llu told=%u\n", (unsigned long long)size_of_other(), kernel_log(tells_of_size));
    else if (other != NULL && strncmp(line, "last ", 5) == 0)
      write_last(strtoull(line + 5, NULL, 10));
    else
      report(count);
  }
  ending = 1;
  for (unsigned i = 0; i < count; i++) pthread_join(parts[i].thread, NULL);
  report(count);
  printf("PRESTAGE end\n");
  power_off();
}
