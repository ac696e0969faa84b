package checkpoint

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// DefaultGrace of garbage collection.
const DefaultGrace = 24 * time.Hour

// Triggers of checkpoints that are kept for longer than others.
const (
	TriggerTurn    = "turn"
	TriggerManual  = "manual"
	TriggerSuspend = "suspend"
)

func keptTrigger(t string) bool {
	return t == TriggerTurn || t == TriggerManual || t == TriggerSuspend
}

// Policy says which checkpoints stay. A zero field means DefaultPolicy's.
type Policy struct {
	Newest  int           // this many, always
	Kept    time.Duration // all of turns, suspends, and those asked for
	Hourly  time.Duration // one of each hour
	Daily   time.Duration // one of each day
	Upgrade time.Duration // the last before each change of OpenCode's version
}

// DefaultPolicy keeps around 150 checkpoints of a session that is always at work.
var DefaultPolicy = Policy{
	Newest: 20, Kept: 24 * time.Hour, Hourly: 48 * time.Hour, Daily: 30 * 24 * time.Hour, Upgrade: 30 * 24 * time.Hour,
}

func (p Policy) withDefaults() Policy {
	d := DefaultPolicy
	if p.Newest == 0 {
		p.Newest = d.Newest
	}
	if p.Kept == 0 {
		p.Kept = d.Kept
	}
	if p.Hourly == 0 {
		p.Hourly = d.Hourly
	}
	if p.Daily == 0 {
		p.Daily = d.Daily
	}
	if p.Upgrade == 0 {
		p.Upgrade = d.Upgrade
	}
	return p
}

// expired gives those of the checkpoints (newest first; the first is the head's)
// that the policy lets go.
func (p Policy) expired(all []Info, now time.Time) []string {
	p = p.withDefaults()
	hours, days := map[time.Time]bool{}, map[time.Time]bool{}
	var out []string
	for i, c := range all {
		age := now.Sub(c.Time)
		hour, day := c.Time.UTC().Truncate(time.Hour), c.Time.UTC().Truncate(24*time.Hour)
		first := func(seen map[time.Time]bool, t time.Time, limit time.Duration) bool {
			if age > limit || seen[t] {
				return false
			}
			seen[t] = true
			return true
		}
		// Each rule is asked, so that the newest of an hour also stands for its day.
		keep := []bool{
			i == 0 || i < p.Newest,
			keptTrigger(c.Trigger) && age <= p.Kept,
			first(hours, hour, p.Hourly),
			first(days, day, p.Daily),
			i > 0 && c.OpenCodeVersion != all[i-1].OpenCodeVersion && age <= p.Upgrade,
		}
		if !slices.Contains(keep, true) {
			out = append(out, c.ID)
		}
	}
	return out
}

// Retain removes checkpoints that the policy lets go, never the head's, and old
// manifests that never became the head's. Only the owner may. Returns ErrFenced.
//
// It is as late as the store said when the head was written: by the clock of a node
// that is years ahead, nearly all would be old.
func (s *Session) Retain(ctx context.Context, o Owner, policy Policy) (deleted []string, err error) {
	head, err := s.Head(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.owns(head, o); err != nil {
		return nil, err
	}
	found, behind, err := s.idsAndBehind(ctx, head)
	if err != nil {
		return nil, err
	}
	all, err := s.infos(ctx, found)
	if err != nil {
		return nil, err
	}
	var keys []string
	for _, o := range behind {
		if o.LastModified.Before(head.written.Add(-DefaultGrace)) {
			keys = append(keys, s.key(o.Key))
		}
	}
	for _, id := range policy.expired(all, head.written) {
		if id != head.Manifest {
			deleted = append(deleted, id)
			keys = append(keys, s.key(id))
		}
	}
	if len(keys) == 0 {
		return nil, nil
	}
	if err := s.r.store.Delete(ctx, keys...); err != nil {
		return nil, fmt.Errorf("remove checkpoints of %q: %w", s.prefix, err)
	}
	return deleted, nil
}
