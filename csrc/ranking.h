// Ranks of right matches in a sorted gallery: parameters and launcher of the kernel.
//
// A query's gallery is ordered by (distance, index): equal distances go by index, as a stable sort
// does. No row is sorted. The rank of a match is 1 + the number of entries before it, which is
// counted: entries of smaller index count if their distance is <= the match's, others if it is <.
#pragma once
#include <cstdint>

namespace dhcl {

// ranks[offsets[q] + i] <- rank of match i of query q, the gallery entry members[begin[q] + i],
// among the entries that are not removed. A match seen by the query's own camera is removed and has
// rank 0.
struct MatchRanksParams {
  int64_t* ranks;                  // [M], M = offsets[Q]
  const void* distance;            // [Q, G] fp32 or fp64
  const int64_t* members;          // [G] gallery entries grouped by identity, ascending in a group
  const int64_t* begin;            // [Q] the query's identity is members[begin[q] .. ]
  const int64_t* offsets;          // [Q + 1] and has offsets[q + 1] - offsets[q] entries
  const int64_t* query_cameras;    // [Q] or null: nothing is removed
  const int64_t* gallery_cameras;  // [G] or null
  int64_t num_queries;             // Q
  int64_t num_gallery;             // G
  bool is_double;
};

// The stream is a cudaStream_t; the launcher does not synchronise with the host.
void launch_match_ranks(const MatchRanksParams& p, void* stream);

}  // namespace dhcl
