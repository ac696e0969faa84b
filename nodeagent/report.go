package nodeagent

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

const (
	reportPause   = 50 * time.Millisecond // between two reports: gathers what changes meanwhile
	reportTimeout = 15 * time.Second
	reportBackoff = time.Second
)

// reporter keeps the newest status of each session until the server has
// acknowledged it.
type reporter struct {
	log *slog.Logger

	mu      sync.Mutex
	pending map[string]*nodev1.SessionStatus
	wake    chan struct{} // holds one
}

func newReporter(log *slog.Logger) *reporter {
	return &reporter{log: log, pending: map[string]*nodev1.SessionStatus{}, wake: make(chan struct{}, 1)}
}

// put replaces what is not acknowledged yet of the session.
func (r *reporter) put(s *nodev1.SessionStatus) {
	r.mu.Lock()
	r.pending[s.GetSessionId()] = s
	r.mu.Unlock()
	r.signal()
}

// putBack keeps a status that was not acknowledged, unless there is a newer one.
func (r *reporter) putBack(s *nodev1.SessionStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pending[s.GetSessionId()] == nil {
		r.pending[s.GetSessionId()] = s
	}
}

func (r *reporter) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *reporter) take() []*nodev1.SessionStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	batch := make([]*nodev1.SessionStatus, 0, len(r.pending))
	for _, s := range r.pending {
		batch = append(batch, s)
	}
	clear(r.pending)
	return batch
}

// run sends what is pending until ctx ends or the registration is over.
func (r *reporter) run(ctx context.Context, client nodev1.DispatchServiceClient, registration string) error {
	r.signal()
	var last time.Time
	for {
		select {
		case <-r.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
		// After a report, not before one: somebody waits for a session that is ready.
		if err := pause(ctx, reportPause-time.Since(last)); err != nil {
			return err
		}
		batch := r.take()
		if len(batch) == 0 {
			continue
		}
		last = time.Now()
		retry, err := r.send(ctx, client, registration, batch)
		for _, s := range retry {
			r.putBack(s)
		}
		if status.Code(err) == codes.FailedPrecondition {
			return err
		}
		if len(retry) > 0 {
			r.signal()
			if err := pause(ctx, reportBackoff); err != nil {
				return err
			}
		}
	}
}

// send returns what has to be sent again.
func (r *reporter) send(ctx context.Context, client nodev1.DispatchServiceClient, registration string, batch []*nodev1.SessionStatus) ([]*nodev1.SessionStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	resp, err := client.ReportStatus(ctx, &nodev1.ReportStatusRequest{RegistrationId: registration, Statuses: batch})
	if err != nil {
		r.log.Debug("report failed", "error", err)
		return batch, err
	}
	var retry []*nodev1.SessionStatus
	for i, s := range batch {
		code := nodev1.ReportResult_RETRY
		if i < len(resp.GetResults()) {
			code = resp.GetResults()[i].GetCode()
		}
		switch code {
		case nodev1.ReportResult_STORED:
		case nodev1.ReportResult_STALE:
			r.log.Debug("report is stale", "session", s.GetSessionId(), "generation", s.GetGeneration())
		default:
			retry = append(retry, s)
		}
	}
	return retry, nil
}

// pause waits, bounded by ctx, whose error it returns.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
