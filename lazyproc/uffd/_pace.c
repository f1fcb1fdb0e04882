#include "_pace.h"

#define EPOCH_NS 2000000000ull
#define INTERVAL_NS 20000000ull
#define RECENT_NS 50000000ull
#define SLICE_NS 64000 /* what a piece may take on the wire while there are faults */
#define FIRST_PAGES 4u
#define FIRST_WINDOW (64ull << 10)
#define MOST_PAGES 62u /* just under four of TCP's largest packets: 64 leave a rest, sent by itself */
#define MAX_WINDOW (32ull << 20)
#define QUIET 4u
#define PATIENT 4u
#define LEAST_PATIENCE_NS 2000000ull
#define MOST_PATIENCE_NS 200000000ull
#define WHOLE 64u
#define MIN_SHARE WHOLE
#define MAX_SHARE (8 * WHOLE)
#define MAX_GAIN 8u
#define LOOK_NS 1000000ull
#define CALM_NS 10000000ull
#define WAKING_NS 400000ull /* of rest for each fault */
#define WAKING_FAULTS 512u
#define REACH 4u
#define REACH_ANSWERS 8u
#define LONGER 3u
#define PACKS_NS 250000u /* to compress a page and to undo it takes a tenth of that */
/* Of the last eight that came as they are: a token bucket lets some through at once. */
#define SLOW_MOSTLY 5
#define SLOW_SURELY 7
#define PLAIN_EVERY 16u
#define TRIAL_INTERVALS 5u
#define LEAST_HOLD_NS 500000000ull
#define MOST_HOLD_NS 8000000000ull
/* Percent. The rate goes up and down by a tenth when nothing is changed. */
#define FULL 85   /* of the greatest rate: the link is used */
#define WORTH 115 /* of the rate before, for twice the gain */
#define AS_GOOD 92 /* of it, for half the gain */

/* True when an epoch has begun. */
static bool note(struct peak *peak, uint64_t now, uint64_t value)
{
    bool begun = now >= peak->until_ns;

    if (begun) {
        peak->before = peak->current;
        peak->current = 0;
        peak->until_ns = now + EPOCH_NS;
    }
    if (value > peak->current)
        peak->current = value;
    return begun;
}

static uint64_t greatest(const struct peak *peak)
{
    return peak->current > peak->before ? peak->current : peak->before;
}

static uint64_t least_ns(const struct peak *peak)
{
    return UINT64_MAX - greatest(peak);
}

void pace_init(struct pace *pace)
{
    *pace = (struct pace){.share = WHOLE, .climb = {.gain = 1, .hold_ns = LEAST_HOLD_NS, .begins = true}};
}

static uint64_t percent(uint64_t value, uint64_t of)
{
    return of ? value * 100 / of : 100;
}

static void try_gain(struct climb *climb, uint32_t gain, uint64_t rate)
{
    climb->before = climb->gain;
    climb->rate_before = rate;
    climb->gain = gain;
}

static void judge_gain(struct climb *climb, uint64_t now, uint64_t rate)
{
    uint64_t wanted = climb->gain > climb->before ? WORTH : AS_GOOD;

    if (percent(rate, climb->rate_before) >= wanted) {
        climb->hold_ns = LEAST_HOLD_NS;
    } else {
        climb->gain = climb->before;
        climb->begins = false;
        climb->hold_until_ns = now + climb->hold_ns;
        climb->hold_ns = 2 * climb->hold_ns < MOST_HOLD_NS ? 2 * climb->hold_ns : MOST_HOLD_NS;
    }
    climb->before = 0;
}

/* Without faults the gain is not in use, and what comes in says nothing of it. */
static void abandon_trial(struct climb *climb)
{
    if (climb->before)
        climb->gain = climb->before;
    climb->before = climb->intervals = 0;
    climb->rates = 0;
}

/* An interval is over in which there were faults. */
static void note_interval(struct climb *climb, uint64_t now, uint64_t rate, uint64_t greatest_rate)
{
    bool full;

    climb->rates += rate;
    if (++climb->intervals < TRIAL_INTERVALS)
        return;
    rate = climb->rates / climb->intervals;
    climb->rates = climb->intervals = 0;
    if (climb->before)
        judge_gain(climb, now, rate);
    if (now < climb->hold_until_ns)
        return;
    full = !climb->begins && percent(rate, greatest_rate) >= FULL;
    if (full && climb->gain > 1)
        try_gain(climb, climb->gain / 2, rate);
    else if (!full && climb->gain < MAX_GAIN)
        try_gain(climb, 2 * climb->gain, rate);
}

/* Over so long a time that what a token bucket lets through at once is not taken for the link. */
static void note_rate(struct pace *pace, uint64_t now, uint64_t bytes_in)
{
    uint64_t time = now - pace->since_ns, least = 2 * least_ns(&pace->bulk), rate;

    if (pace->since_ns != 0 && bytes_in >= pace->bytes_in) {
        if (time < (least > INTERVAL_NS ? least : INTERVAL_NS))
            return;
        rate = (uint64_t)((double)(bytes_in - pace->bytes_in) * 1e9 / (double)time);
        note(&pace->rate, now, rate);
        if (now >= pace->fault_ns + RECENT_NS)
            abandon_trial(&pace->climb);
        else if (pace->since_ns >= pace->drain_until_ns)
            note_interval(&pace->climb, now, rate, greatest(&pace->rate));
    } /* or else it is the first answer, of a new connection */
    pace->since_ns = now;
    pace->bytes_in = bytes_in;
}

void pace_bulk(struct pace *pace, uint64_t now, uint64_t asked, uint64_t bytes_in)
{
    uint64_t delay = now > asked ? now - asked : 1;

    if (note(&pace->bulk, now, UINT64_MAX - delay))
        pace->drain_until_ns = now + 2 * delay; /* otherwise its own queue is soon all that it has ever seen */
    note_rate(pace, now, bytes_in);
}

static void note_fault(struct pace *pace, uint64_t now)
{
    pace->fault_ns = now;
    pace->faults += pace->wakes;
}

/* First some with one page, then with more, unless those take too much longer. */
static void note_reach(struct reach *reach, uint64_t delay, uint32_t pages)
{
    if (pages != reach->pages || (pages == 1 && reach->alone_ns))
        return;
    reach->waited_ns += delay;
    if (++reach->answers < REACH_ANSWERS)
        return;
    if (pages == 1) {
        reach->alone_ns = reach->waited_ns;
        reach->pages = REACH;
    } else if (reach->waited_ns > LONGER * reach->alone_ns) {
        reach->pages = 1;
    }
    reach->waited_ns = reach->answers = 0;
}

void pace_urgent(struct pace *pace, uint64_t now, uint64_t asked, uint32_t pages, bool plain)
{
    uint64_t delay = now > asked ? now - asked : 1;

    note_fault(pace, now);
    if (pace->wakes)
        note_reach(&pace->reach, delay, pages);
    note(&pace->urgent, now, UINT64_MAX - delay);
    if (plain)
        pace->slow = (uint8_t)(pace->slow << 1 | (delay >= PACKS_NS));
    if (delay <= 2 * least_ns(&pace->urgent))
        pace->share += pace->share < MAX_SHARE;
    else
        pace->share = pace->share - pace->share / 8 > MIN_SHARE ? pace->share - pace->share / 8 : MIN_SHARE;
}

void pace_waited(struct pace *pace, uint64_t now)
{
    note_fault(pace, now);
}

void pace_wakes(struct pace *pace, uint64_t now)
{
    pace->wakes_ns = now;
    pace->wakes = true;
    pace->reach = (struct reach){.pages = 1};
}

bool pace_is_slow(const struct pace *pace)
{
    return __builtin_popcount(pace->slow) >= SLOW_SURELY;
}

bool pace_packs(struct pace *pace)
{
    return __builtin_popcount(pace->slow) >= SLOW_MOSTLY && pace->urgent_asked++ % PLAIN_EVERY;
}

uint32_t pace_reach(const struct pace *pace)
{
    return pace->wakes ? pace->reach.pages : 1;
}

uint64_t pace_rest(struct pace *pace, uint64_t now)
{
    uint64_t last = pace->fault_ns > pace->wakes_ns ? pace->fault_ns : pace->wakes_ns;
    uint64_t earned = pace->faults * WAKING_NS;

    if (pace->faults >= WAKING_FAULTS || now >= last + CALM_NS || now >= pace->wakes_ns + CALM_NS + earned)
        pace->wakes = false;
    return pace->wakes ? LOOK_NS : 0;
}

static uint64_t clamp(uint64_t value, uint64_t least, uint64_t most)
{
    return value < least ? least : value > most ? most : value;
}

/* Of a request that is on the wire for so long, on an empty way. Where faults never cease bulk has not seen that. */
static uint64_t delay_ns(const struct pace *pace, double wire_ns)
{
    uint64_t bulk = least_ns(&pace->bulk);
    double urgent = greatest(&pace->urgent) ? (double)least_ns(&pace->urgent) + wire_ns : (double)bulk;

    return urgent < (double)bulk ? (uint64_t)urgent : bulk;
}

struct quota pace_quota(const struct pace *pace, uint64_t now, bool faults_wait, uint32_t page_bytes)
{
    bool recent = faults_wait || now < pace->fault_ns + RECENT_NS;
    double rate = (double)greatest(&pace->rate);
    uint64_t gain = pace->climb.gain, pipe, pages, window;

    if (rate == 0)
        return (struct quota){FIRST_WINDOW, FIRST_PAGES};
    pages = clamp((uint64_t)(rate * SLICE_NS * (double)(recent ? gain : QUIET) / 1e9) / page_bytes, 1, MOST_PAGES);
    pipe = (uint64_t)(rate * (double)delay_ns(pace, (double)pages * page_bytes * 1e9 / rate) / 1e9);
    if (now < pace->drain_until_ns)
        return (struct quota){pages * page_bytes, (uint32_t)pages};
    /* One more than the pipe holds: the far end finds the next one when it has sent one. */
    window = recent ? pipe * pace->share * gain / WHOLE + pages * page_bytes : pipe * QUIET;
    return (struct quota){clamp(window, 2 * pages * page_bytes, MAX_WINDOW), (uint32_t)pages};
}

uint64_t pace_patience(const struct pace *pace)
{
    return greatest(&pace->bulk) ? clamp(PATIENT * least_ns(&pace->bulk), LEAST_PATIENCE_NS, MOST_PATIENCE_NS)
                                 : LEAST_PATIENCE_NS;
}
