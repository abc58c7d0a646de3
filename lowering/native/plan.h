// The relation cut into groups of queries that see the same keys. Note [groups]:
//
// Inside a span of positions that crosses no segment border, queries of one residue class in every branch have the same keys
// up to the causal or window limit. A group is such queries; its keys are a sorted list of positions with the number of
// branches that hold each, so a key that three branches share is computed once. The limits of one query are then a range of
// that list. Keys that only a window gives form a second list, whose ranges are narrower.
//
//     segments 8 and 16, rates 1 and 2, queries 0 to 7 of residue 1:   keys  0 1 2 3 4 5 6 7 9 11 13 15
//                                                                      times 1 2 1 2 1 2 1 2 1 1  1  1
//
// Groups of a span share most of their keys (there the queries of residue 0 see the keys 0 to 7 too, once). Fetching keys is dear
// beside computing with them, so groups form a batch, and the batch's keys form lists by which groups see them: each key is
// fetched once for all of these, and counts for each as often as that group has it.
#pragma once
#include <algorithm>
#include <numeric>
#include <unordered_map>
#include <utility>
#include <vector>

#include "call.h"
#include "progressions.h"

namespace dil {

// A range of positions of one key head in one batch row, counted from the start of its document.
struct Span {
  int64_t batch, kv_head;
  int64_t origin, k_len;  // first position of the document, its length
  int64_t begin, end;     // query positions, `q_step` apart
  int64_t row, rows;      // of q: that of the first position, how many
};

// The row of k and v that a position stands for; positions one step apart count from the origin of the span's document.
inline int64_t first_key_row(const Call& call, const Span& span) { return call.k_step == 1 ? span.origin - call.k_start : 0; }

// Keys that the same groups of a batch see.
struct Keys {
  std::vector<int32_t> position;          // ascending
  std::vector<int32_t> row;               // of k and v, from `first_key_row` on; empty: as the positions
  std::vector<std::vector<float>> times;  // by group, how often each key counts; empty: once
  uint64_t groups = 0;                    // bit n: the n-th group sees these keys
  int64_t left = kNoLimit, right = kNoLimit;

  int64_t size() const { return int64_t(position.size()); }
  const int32_t* rows() const { return row.empty() ? position.data() : row.data(); }
  bool seen_by(int group) const { return groups >> group & 1; }
  const float* times_of(int group, int64_t at) const {
    return times[size_t(group)].empty() ? nullptr : &times[size_t(group)][size_t(at)];
  }
};

// One query: a position, a query head inside the group of heads that share a key head, and the row of q.
struct Lane {
  int32_t position, head, row;
};

// A group in a batch: lanes `first` to `first + lanes`. It begins at a whole vector.
struct Group {
  int64_t first, lanes;
};

inline int64_t floor_to(int64_t a, int64_t b) { return a - floor_mod(a, b); }
inline int64_t tighter(int64_t a, int64_t b) { return a == kNoLimit ? b : b == kNoLimit ? a : std::min(a, b); }

class Plan {
 public:
  Plan(const Call& call, const Span& span) : call_(call), span_(span), per_key_head_(call.heads / call.kv_heads) {
    for (int64_t i = 0; i < call.num_terms; ++i)
      if (call.terms[i].kind == kBlocks) blocks_ = &call.terms[i];
    sort_lanes(count_lanes());
  }

  // use(lanes, groups, lists) for batches of at most `most` lanes, counted in whole vectors of `width`.
  template <class Use>
  void each_batch(int64_t most, int64_t width, Use use) {
    auto whole = [&](size_t g) { return (group_starts_[g + 1] - group_starts_[g] + width - 1) / width * width; };
    for (size_t g = 0, next; g + 1 < group_starts_.size(); g = next) {
      int64_t together = whole(g);
      // Blocks beside other terms: no lists of both are joined.
      bool shares = !blocks_ || call_.num_terms == 1;
      for (next = g + 1; shares && next + 1 < group_starts_.size() && next - g < kMostGroups; ++next) {
        if (together + whole(next) > most) break;
        together += whole(next);
      }
      bound(g, next);
      if (next - g > 1 && (blocks_ ? join_blocks(g, next - g) : join(g, next - g))) {
        lay_out(g, next, width);
        number_rows();
        use(batch_lanes_.data(), groups_, lists_);
        continue;
      }
      find_batch(g, next);
      for (size_t one = g; one < next; ++one) {
        take_own(one - g);
        number_rows();
        for (int64_t first = group_starts_[one]; first < group_starts_[one + 1]; first += most) {
          groups_ = {{0, std::min(most, group_starts_[one + 1] - first)}};
          use(&lanes_[size_t(first)], groups_, lists_);
        }
      }
    }
  }

 private:
  static constexpr size_t kMostGroups = 64;
  static constexpr int64_t kFewCodes = 1 << 12;
  // What fetching a key costs, and beginning a block of 128 keys for a lane.
  static constexpr int64_t kFetch = 12, kBlockKeys = 128;

  // The keys of one group, from all terms but windows, or from windows alone.
  struct Own {
    std::vector<int32_t> position;
    std::vector<float> times;
    bool repeated = false;  // any of `times` is not 1

    void clear() { position.clear(), times.clear(), repeated = false; }
  };

  const Call& call_;
  const Span& span_;
  int64_t per_key_head_, low_ = 0, high_ = 0;
  int64_t first_ = 0, last_ = 0;    // positions of a batch's lanes
  const Term* blocks_ = nullptr;    // the term of them, if there is one
  std::vector<Lane> lanes_;            // group after group, ascending positions inside a group
  std::vector<int64_t> group_starts_;  // and the end
  std::vector<Own> shared_, windowed_;  // of the groups of a batch
  int64_t window_left_ = kNoLimit, window_right_ = kNoLimit;
  std::vector<Lane> batch_lanes_;
  std::vector<Group> groups_;
  std::vector<Keys> lists_;
  std::vector<std::pair<int64_t, size_t>> entries_;       // a column and a group that has it
  std::unordered_map<uint64_t, size_t> list_numbers_;     // by groups
  std::vector<int64_t> codes_;
  std::vector<int32_t> merged_position_;
  std::vector<float> merged_times_;
  std::vector<KeyProgression> progressions_;  // of a batch's groups
  MergedKeys merged_;

  // The limits of all lanes of the groups from `begin` to before `end`.
  void bound(size_t begin, size_t end) {
    first_ = INT64_MAX, last_ = INT64_MIN;
    for (size_t g = begin; g < end; ++g) {
      first_ = std::min<int64_t>(first_, first_of(g).position);
      last_ = std::max<int64_t>(last_, lanes_[size_t(group_starts_[g + 1]) - 1].position);
    }
    low_ = std::max<int64_t>(0, first_key());
    high_ = std::min(span_.k_len, call_.k_stop - span_.origin);
    if (call_.left != kNoLimit) low_ = std::max(low_, first_ - call_.left);
    if (call_.right != kNoLimit) high_ = std::min(high_, last_ + call_.right + 1);
  }

  // Where the first row of k stands.
  int64_t first_key() const { return call_.k_start - span_.origin; }

  // The rows of k that the positions of the lists stand for.
  void number_rows() {
    if (call_.k_step == 1) return;
    int64_t first = first_key();
    for (Keys& keys : lists_) {
      keys.row.resize(keys.position.size());
      for (size_t i = 0; i < keys.row.size(); ++i)
        keys.row[i] = int32_t(uint32_t(keys.position[i] - first) / uint32_t(call_.k_step));
    }
  }

  // Those of the positions that are inside the limits and have a row of k.
  Steps held(Steps of) const {
    if (of.start < low_) of.start = align_up(low_, of.start, of.step);
    of.stop = std::min(of.stop, high_);
    return meet(of, first_key(), call_.k_step);
  }

  const Lane& first_of(size_t group) const { return lanes_[size_t(group_starts_[group])]; }

  // The keys of each group from `begin` to before `end`, inside those limits.
  void find_batch(size_t begin, size_t end) {
    if (shared_.size() < end - begin) shared_.resize(end - begin), windowed_.resize(end - begin);
    for (size_t g = begin; g < end; ++g)
      find_keys(first_of(g), shared_[g - begin], windowed_[g - begin]);
  }

  void find_keys(const Lane& lane, Own& shared, Own& windowed) {
    shared.clear(), windowed.clear();
    const Term* window = nullptr;
    for (int64_t i = 0; i < call_.num_terms; ++i) {
      const Term& term = call_.terms[i];
      if (term.kind == kWindow) {
        window = &term;
      } else if (term.kind == kBlocks) {
        unite_blocks(shared, term, lane);
      } else {
        KeyProgression found = progression_of(term, lane);
        unite(shared, found.start, found.stop, found.step, term.dedupe);
      }
    }
    if (window) find_window(shared, windowed, *window, lane);
    drop_padding(shared.position, &shared.times), drop_padding(windowed.position, &windowed.times);
  }

  // The lists of the group alone.
  void take_own(size_t n) {
    lists_.resize(2);
    for (Own* own : {&shared_[n], &windowed_[n]}) {
      Keys& to = lists_[own == &windowed_[n]];
      to.position.swap(own->position), to.groups = 1, to.times.resize(1), to.times[0].clear();
      if (own->repeated) to.times[0].swap(own->times);
      limit(to, own == &windowed_[n]);
    }
  }

  void limit(Keys& keys, bool windowed) const {
    keys.left = windowed ? window_left_ : call_.left, keys.right = windowed ? window_right_ : call_.right;
  }

  // The lists of `count` groups from `begin`; false if each group by itself is less work.
  bool join(size_t begin, size_t count) {
    lists_.clear();
    if (find_progressions(begin, count)) {
      join_progressions(count);
    } else {
      find_batch(begin, begin + count);
      join_lists(shared_, count, false), join_lists(windowed_, count, true);
    }
    std::vector<int64_t> own(count, 0);
    int64_t work = 0, apart = 0;
    for (const Keys& keys : lists_) {
      int64_t lanes = 0;
      for (size_t g = 0; g < count; ++g)
        if (keys.seen_by(int(g))) lanes += lanes_of(begin + g), own[g] += keys.size();
      work += work_of(keys.size(), lanes);
    }
    for (size_t g = 0; g < count; ++g) apart += work_of(own[g], lanes_of(begin + g));
    return work < apart;
  }

  // The keys of the groups as progressions; false where they are not, or are too many.
  bool find_progressions(size_t begin, size_t count) {
    progressions_.clear();
    for (int64_t i = 0; i < call_.num_terms; ++i) {
      const Term& term = call_.terms[i];
      if (term.kind == kWindow || term.kind == kBlocks) return false;
      size_t of_term = progressions_.size();
      for (size_t g = 0; g < count; ++g) {
        KeyProgression found = progression_of(term, first_of(begin + g));
        if (found.start >= found.stop) continue;
        size_t n = of_term;
        while (n < progressions_.size() && progressions_[n].start != found.start) ++n;
        if (n == MergedKeys::kMost) return false;
        if (n == progressions_.size()) progressions_.push_back(found);
        progressions_[n].groups |= uint64_t(1) << g;
      }
    }
    return true;
  }

  // The keys inside the limits that one term, a window or blocks excepted, gives a lane.
  KeyProgression progression_of(const Term& term, const Lane& lane) const {
    int64_t start = 0, stop = span_.k_len, step = 1;
    if (term.kind == kSinks) {
      stop = term.count;
    } else if (term.kind == kSegment) {
      int64_t segment = floor_to(lane.position, term.length), own = (lane.position - segment) % term.rate;
      int64_t residue = term.residues ? term.residues[span_.kv_head] : own;
      if (own != residue || !has_head(term, lane)) return {0, 0, 1, 0, false};
      start = segment + residue, stop = segment + term.length, step = term.rate;
    }
    Steps found = held({start, stop, step});
    if (found.start >= found.stop) return {0, 0, 1, 0, false};
    step = std::min<int64_t>(found.step, INT32_MAX);
    return {int32_t(found.start), int32_t(found.stop), int32_t(step), 0, term.dedupe != 0};
  }

  void join_progressions(size_t count) {
    merged_.merge(progressions_, count);
    if (call_.key_padding) merged_.keep_only(padding_of_span(), call_.padding_key);
    std::vector<size_t> list;
    std::vector<uint64_t> repeated;  // groups of a list for which some key counts more than once
    for (const KeyKind& kind : merged_.kinds) {
      list.push_back(size_t(&list_of(kind.groups, 0, count, false) - lists_.data()));
      repeated.resize(lists_.size(), 0);
      for (size_t g = 0; g < count; ++g) repeated[list.back()] |= uint64_t(kind.times[g] > 1) << g;
    }
    for (size_t i = 0; i < merged_.position.size(); ++i) {
      size_t n = list[merged_.kind[i]];
      lists_[n].position.push_back(merged_.position[i]);
      for (uint64_t left = repeated[n]; left; left &= left - 1) {
        size_t g = size_t(__builtin_ctzll(left));
        lists_[n].times[g].push_back(merged_.kinds[merged_.kind[i]].times[g]);
      }
    }
  }

  int64_t lanes_of(size_t group) const { return group_starts_[group + 1] - group_starts_[group]; }
  static int64_t work_of(int64_t keys, int64_t lanes) {
    return keys * kFetch + (keys + kBlockKeys - 1) / kBlockKeys * lanes;
  }

  void join_lists(const std::vector<Own>& own, size_t count, bool windowed) {
    size_t at[kMostGroups] = {}, first = lists_.size();
    Keys* last = nullptr;
    while (true) {
      int32_t position = INT32_MAX;
      for (size_t g = 0; g < count; ++g)
        if (at[g] < own[g].position.size()) position = std::min(position, own[g].position[at[g]]);
      if (position == INT32_MAX) return;
      uint64_t groups = 0;
      for (size_t g = 0; g < count; ++g)
        groups |= uint64_t(at[g] < own[g].position.size() && own[g].position[at[g]] == position) << g;
      if (!last || last->groups != groups) last = &list_of(groups, first, count, windowed);
      last->position.push_back(position);
      for (size_t g = 0; g < count; ++g) {
        if (!(groups >> g & 1)) continue;
        if (own[g].repeated) last->times[g].push_back(own[g].times[at[g]]);
        ++at[g];
      }
    }
  }

  Keys& list_of(uint64_t groups, size_t first, size_t count, bool windowed) {
    for (size_t n = first; n < lists_.size(); ++n)
      if (lists_[n].groups == groups) return lists_[n];
    Keys& made = lists_.emplace_back();
    made.groups = groups, made.times.resize(count);
    limit(made, windowed);
    return made;
  }

  // The lanes of a batch, every group beginning at a whole vector.
  void lay_out(size_t begin, size_t end, int64_t width) {
    batch_lanes_.clear(), groups_.clear();
    for (size_t g = begin; g < end; ++g) {
      groups_.push_back({int64_t(batch_lanes_.size()), lanes_of(g)});
      batch_lanes_.insert(batch_lanes_.end(), lanes_.begin() + group_starts_[g], lanes_.begin() + group_starts_[g + 1]);
      batch_lanes_.resize((batch_lanes_.size() + size_t(width) - 1) / size_t(width) * size_t(width), batch_lanes_.back());
    }
  }

  bool has_head(const Term& term, const Lane& lane) const {
    int64_t head = span_.kv_head * per_key_head_ + lane.head;
    return head >= term.head_start && head < term.head_stop;
  }

  // A number for each lane, equal for lanes with the same keys; and what is above all of them.
  int64_t count_lanes() {
    int64_t count = span_.rows * per_key_head_;
    lanes_.resize(size_t(count)), codes_.assign(size_t(count), 0);
    // A lane is little work beside which divisions would count, here and in `code`.
    for (int64_t n = 0, i = 0; n < span_.rows; ++n)
      for (int64_t head = 0; head < per_key_head_; ++head, ++i)
        lanes_[size_t(i)] = {int32_t(span_.begin + n * call_.q_step), int32_t(head), int32_t(span_.row + n)};
    int64_t bound = 1;
    for (int64_t i = 0; i < call_.num_terms; ++i) {
      const Term& term = call_.terms[i];
      int64_t kinds = kinds_of(term);
      if (kinds == 1) continue;
      if (bound > INT64_MAX / 2 / kinds) bound = renumber(bound);
      bound *= kinds;
      code(term, kinds);
    }
    return bound;
  }

  // Query heads of the group whose blocks differ.
  int64_t heads_of(const Term& term) const { return term.lists > 1 ? per_key_head_ : 1; }

  int64_t kinds_of(const Term& term) const {
    if (term.kind == kWindow) return term.step;
    if (term.kind == kBlocks) {
      int64_t rows = (floor_to(span_.end - 1, term.q_block) - floor_to(span_.begin, term.q_block)) / term.q_block + 1;
      return rows * heads_of(term);
    }
    if (term.kind != kSegment) return 1;
    bool every_head = term.head_start <= span_.kv_head * per_key_head_ && term.head_stop >= (span_.kv_head + 1) * per_key_head_;
    if (term.rate == 1 && every_head) return 1;
    return term.residues ? 2 : term.rate + 1;
  }

  void code(const Term& term, int64_t kinds) {
    int64_t heads = per_key_head_;
    if (term.kind == kWindow) {
      for (size_t i = 0; i < lanes_.size(); ++i) codes_[i] = codes_[i] * kinds + floor_mod(lanes_[i].position, kinds);
      return;
    }
    if (term.kind == kBlocks) {
      int64_t differ = heads_of(term), row = 0, next = floor_to(span_.begin, term.q_block) + term.q_block;
      for (size_t i = 0; i < lanes_.size(); ++i) {
        while (lanes_[i].position >= next) next += term.q_block, ++row;
        codes_[i] = codes_[i] * kinds + row * differ + (differ > 1 ? lanes_[i].head : 0);
      }
      return;
    }
    // Inside a span the segment is one, so the residue only counts up.
    int64_t rate = term.rate, at = floor_mod(span_.begin, term.length) % rate, step = call_.q_step % rate;
    int64_t residue = term.residues ? term.residues[span_.kv_head] : -1;
    for (size_t i = 0; i < lanes_.size(); i += size_t(heads)) {
      for (size_t g = i; g < i + size_t(heads); ++g) {
        int64_t found = !has_head(term, lanes_[g]) ? 0 : residue < 0 ? at + 1 : at == residue;
        codes_[g] = codes_[g] * kinds + found;
      }
      at += step;
      if (at >= rate) at -= rate;
    }
  }

  // Codes as 0, 1, ... in their order; how many there are. `bound`: above all codes.
  int64_t renumber(int64_t bound) {
    if (bound <= kFewCodes) {
      std::vector<int64_t> number(size_t(bound), 0);
      for (int64_t c : codes_) number[size_t(c)] = 1;
      int64_t found = 0;
      for (int64_t& n : number)
        if (n) n = found++;
      for (int64_t& c : codes_) c = number[size_t(c)];
      return found;
    }
    std::vector<int64_t> sorted(codes_);
    std::sort(sorted.begin(), sorted.end());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    for (int64_t& c : codes_) c = std::lower_bound(sorted.begin(), sorted.end(), c) - sorted.begin();
    return int64_t(sorted.size());
  }

  void sort_lanes(int64_t bound) {
    int64_t numbers = renumber(bound);
    group_starts_.assign(size_t(numbers) + 1, 0);
    for (int64_t c : codes_) ++group_starts_[size_t(c) + 1];
    std::partial_sum(group_starts_.begin(), group_starts_.end(), group_starts_.begin());
    std::vector<int64_t> next(group_starts_.begin(), group_starts_.end() - 1);
    std::vector<Lane> sorted(lanes_.size());
    for (size_t i = 0; i < lanes_.size(); ++i) sorted[size_t(next[size_t(codes_[i])]++)] = lanes_[i];
    lanes_.swap(sorted);
  }

  // Where the columns of a lane's block row begin and end among those of the term.
  std::pair<int64_t, int64_t> line_of(const Term& term, const Lane& lane) const {
    int64_t line = floor_to(lane.position, term.q_block) / term.q_block - term.first_line;
    if (line < 0 || line >= term.lines) return {0, 0};
    int64_t list = span_.batch * term.batch_lists + (term.lists > 1 ? span_.kv_head * per_key_head_ + lane.head : 0);
    const int64_t* start = term.starts + list * (term.lines + 1) + line;
    return {start[0], start[1]};
  }

  // The lists of `count` groups from `begin`, found column by column; false if each group by itself is less work.
  bool join_blocks(size_t begin, size_t count) {
    lists_.clear(), list_numbers_.clear(), entries_.clear();
    int64_t work = 0, apart = 0, block_keys = std::max<int64_t>(1, blocks_->k_block / call_.k_step);
    // Columns with keys inside the limits.
    int64_t first = floor_to(low_, blocks_->k_block) / blocks_->k_block;
    int64_t last = floor_to(high_ - 1, blocks_->k_block) / blocks_->k_block;
    for (size_t g = 0; g < count; ++g) {
      auto [from, to] = line_of(*blocks_, first_of(begin + g));
      int64_t own = 0;
      for (int64_t i = from; i < to; ++i) {
        if (blocks_->columns[i] < first || blocks_->columns[i] > last) continue;
        entries_.push_back({blocks_->columns[i], g}), ++own;
      }
      apart += work_of(own * block_keys, lanes_of(begin + g));
    }
    std::sort(entries_.begin(), entries_.end());
    for (size_t i = 0, next; i < entries_.size(); i = next) {
      uint64_t groups = 0;
      int64_t lanes = 0, column = entries_[i].first;
      for (next = i; next < entries_.size() && entries_[next].first == column; ++next)
        groups |= uint64_t(1) << entries_[next].second, lanes += lanes_of(begin + entries_[next].second);
      work += work_of(block_keys, lanes);
      auto [place, fresh] = list_numbers_.try_emplace(groups, lists_.size());
      if (fresh) lists_.emplace_back(), lists_.back().groups = groups, lists_.back().times.resize(count);
      Keys& keys = lists_[place->second];
      limit(keys, false);
      Steps there = held({column * blocks_->k_block, (column + 1) * blocks_->k_block, 1});
      if (there.start >= there.stop) continue;
      size_t at = keys.position.size();
      keys.position.resize(at + size_t((there.stop - there.start + there.step - 1) / there.step));
      for (int64_t p = there.start; p < there.stop; p += there.step) keys.position[at++] = int32_t(p);
    }
    for (Keys& keys : lists_) drop_padding(keys.position, nullptr);
    return work < apart;
  }

  void unite_blocks(Own& shared, const Term& term, const Lane& lane) {
    auto [from, to] = line_of(term, lane);
    for (int64_t i = from, next; i < to; i = next) {
      for (next = i + 1; next < to && term.columns[next] == term.columns[next - 1] + 1;) ++next;
      Steps there = held({term.columns[i] * term.k_block, (term.columns[next - 1] + 1) * term.k_block, 1});
      unite(shared, there.start, there.stop, there.step, term.dedupe);
    }
  }

  // Add the keys start, start + step, ... below stop; with `once` only those that are not there yet.
  void unite(Own& shared, int64_t start, int64_t stop, int64_t step, bool once) {
    if (start >= stop) return;
    size_t count = size_t((stop - start + step - 1) / step), i = 0, end = shared.position.size();
    if (end == 0 || shared.position.back() < start) {
      shared.position.resize(end + count), shared.times.resize(end + count, 1.0f);
      for (size_t n = 0; n < count; ++n) shared.position[end + n] = int32_t(start + int64_t(n) * step);
      return;
    }
    merged_position_.resize(end + count), merged_times_.resize(end + count);
    size_t n = 0;
    for (int64_t p = start; p < stop; p += step) {
      while (i < end && shared.position[i] < p) merged_position_[n] = shared.position[i], merged_times_[n++] = shared.times[i++];
      bool there = i < end && shared.position[i] == p;
      merged_position_[n] = int32_t(p);
      merged_times_[n++] = !there ? 1.0f : once ? shared.times[i] : shared.times[i] + 1.0f;
      if (there && !once) shared.repeated = true;
      i += there;
    }
    while (i < end) merged_position_[n] = shared.position[i], merged_times_[n++] = shared.times[i++];
    merged_position_.resize(n), merged_times_.resize(n);
    shared.position.swap(merged_position_), shared.times.swap(merged_times_);
  }

  void find_window(const Own& shared, Own& windowed, const Term& term, const Lane& lane) {
    window_left_ = tighter(call_.left, term.left), window_right_ = tighter(call_.right, term.right);
    int64_t start = low_, stop = high_;
    if (term.left != kNoLimit) start = std::max(start, first_ - term.left);
    if (term.right != kNoLimit) stop = std::min(stop, last_ + term.right + 1);
    Steps there = held({align_up(start, lane.position, term.step), stop, term.step});
    if (there.start >= there.stop) return;
    auto next = std::lower_bound(shared.position.begin(), shared.position.end(), int32_t(there.start));
    for (int64_t p = there.start; p < there.stop; p += there.step) {
      while (next != shared.position.end() && *next < p) ++next;
      if (next != shared.position.end() && *next == p) continue;
      windowed.position.push_back(int32_t(p)), windowed.times.push_back(1.0f);
    }
  }

  const bool* padding_of_span() const {
    return call_.key_padding + span_.batch * call_.padding_batch + span_.origin * call_.padding_key;
  }

  void drop_padding(std::vector<int32_t>& position, std::vector<float>* times) const {
    if (!call_.key_padding) return;
    const bool* keep = padding_of_span();
    size_t n = 0;
    for (size_t i = 0; i < position.size(); ++i) {
      if (!keep[position[i] * call_.padding_key]) continue;
      if (times) (*times)[n] = (*times)[i];
      position[n++] = position[i];
    }
    position.resize(n);
    if (times) times->resize(n);
  }
};

// The half-open range of a sorted list of keys that each lane sees.
inline void find_ranges(const Call& call, const Span& span, const Keys& keys, const Lane* lanes, int64_t count, int32_t* low,
                        int32_t* high) {
  int64_t size = keys.size(), a = 0, b = 0;
  bool from_first = keys.left == kNoLimit || keys.position.front() >= lanes[count - 1].position - keys.left;
  bool to_last = keys.right == kNoLimit || keys.position.back() <= lanes[0].position + keys.right;
  if (from_first && to_last && call.row_limits == nullptr) {
    std::fill_n(low, count, 0), std::fill_n(high, count, int32_t(size));
    return;
  }
  // Lanes ascend: only the first is looked for in the whole list.
  auto first_from = [&](int64_t position) {
    position = std::clamp<int64_t>(position, INT32_MIN, INT32_MAX);
    return std::lower_bound(keys.position.begin(), keys.position.end(), int32_t(position)) - keys.position.begin();
  };
  if (keys.left != kNoLimit) a = first_from(lanes[0].position - keys.left);
  if (keys.right != kNoLimit) b = first_from(lanes[0].position + keys.right + 1);
  for (int64_t i = 0; i < count; ++i) {
    int64_t t = lanes[i].position;
    if (keys.left != kNoLimit)
      while (a < size && keys.position[size_t(a)] < t - keys.left) ++a;
    if (keys.right == kNoLimit) {
      b = size;
    } else {
      while (b < size && keys.position[size_t(b)] <= t + keys.right) ++b;
    }
    low[i] = int32_t(std::min(a, b)), high[i] = int32_t(b);
  }
  if (call.row_limits == nullptr) return;
  const int64_t* starts = call.row_limits + (call.limit_rows == 1 ? 0 : span.batch) * call.q_len;
  const int64_t* ends = starts + call.limit_rows * call.q_len;
  auto below = [&](int64_t position) {
    position = std::clamp<int64_t>(position - span.origin, 0, INT32_MAX);
    return int32_t(std::lower_bound(keys.position.begin(), keys.position.end(), int32_t(position)) - keys.position.begin());
  };
  for (int64_t i = 0; i < count; ++i) {
    high[i] = std::min(high[i], below(ends[lanes[i].row]));
    low[i] = std::min(high[i], std::max(low[i], below(starts[lanes[i].row])));
  }
}

// Queries in a span: enough that many queries share the gathered keys, few enough that every thread has work with the spans
// of `key_heads`.
inline int64_t rows_of_span(const Call& call, int64_t key_heads) {
  int64_t widest = 1, heads = call.heads / call.kv_heads;
  for (int64_t i = 0; i < call.num_terms; ++i)
    if (call.terms[i].kind == kSegment) widest = std::max(widest, call.terms[i].rate / std::gcd(call.terms[i].rate, call.q_step));
  int64_t rows = std::max<int64_t>(768 / heads, 64 * widest / heads);
  int64_t fair = call.q_len * key_heads / (4 * call.threads) + 1;
  return std::max<int64_t>(48, std::max<int64_t>(1, std::min(std::max<int64_t>(rows, 2048), fair)));
}

// The spans of one document's queries, from `first` to before `last`.
inline void add_spans(const Call& call, int64_t batch, int64_t origin, int64_t k_len, int64_t first, int64_t last, int64_t rows,
                      std::vector<Span>& found) {
  for (int64_t t = align_up(first, call.q_offset - origin, call.q_step), end, count; t < last; t += count * call.q_step) {
    end = std::min(t + rows * call.q_step, last);
    for (int64_t i = 0; i < call.num_terms; ++i) {
      const Term& term = call.terms[i];
      if (term.kind == kSegment) end = std::min(end, floor_to(t, term.length) + term.length);
    }
    count = (end - t + call.q_step - 1) / call.q_step;
    int64_t row = (origin + t - call.q_offset) / call.q_step;
    for (int64_t h = 0; h < call.kv_heads; ++h) found.push_back({batch, h, origin, k_len, t, end, row, count});
  }
}

// Spans of all documents, key heads and batch rows, cut at segment borders and into at most `rows` queries.
inline std::vector<Span> spans_of(const Call& call, int64_t rows) {
  std::vector<Span> found;
  int64_t q_first = call.q_offset, q_last = call.q_offset + (call.q_len - 1) * call.q_step + 1;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t* ids = call.documents ? call.documents + (call.document_rows == 1 ? 0 : b) * call.k_len : nullptr;
    if (!ids) {
      // Queries may stand before or behind the keys.
      add_spans(call, b, 0, call.k_len, q_first, q_last, rows, found);
      continue;
    }
    add_spans(call, b, 0, 0, q_first, std::min<int64_t>(q_last, 0), rows, found);
    int64_t start = std::clamp<int64_t>(q_first, 0, call.k_len), stop;
    // The first query may stand inside a document.
    while (start > 0 && start < call.k_len && ids[start - 1] == ids[start]) --start;
    for (; start < std::min(call.k_len, q_last); start = stop) {
      for (stop = start + 1; stop < call.k_len && ids[stop] == ids[start];) ++stop;
      int64_t first = std::max(start, q_first), last = std::min(stop, q_last);
      add_spans(call, b, start, stop - start, first - start, last - start, rows, found);
    }
    add_spans(call, b, 0, 0, std::max(call.k_len, q_first), q_last, rows, found);
  }
  return found;
}

}  // namespace dil
