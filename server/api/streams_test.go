package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func TestReadLogs(t *testing.T) {
	agent := &fakeAgent{lines: []string{"one", "two", "three"}, err: io.EOF}
	f := newFixture(t, func(c *Config) { c.Agents = agent })
	read := func(tail int32) (lines []string, err error) {
		stream, err := f.ReadSessionLogs(t.Context(), &cloudcodev1.ReadSessionLogsRequest{Name: "sessions/a", TailLines: tail})
		if err != nil {
			return nil, err
		}
		for {
			entry, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return lines, nil
			} else if err != nil {
				return lines, err
			}
			lines = append(lines, entry.GetLine())
		}
	}
	_, err := read(0)
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")
	f.create(t, "a", nil)
	_, err = read(0)
	wantErr(t, "not placed", err, codes.FailedPrecondition, "SESSION_NOT_PLACED")
	_, err = read(-1)
	wantErr(t, "negative", err, codes.InvalidArgument, "INVALID_FIELDS")
	f.edit(t, "a", place)
	if lines, err := read(0); err != nil || !slices.Equal(lines, agent.lines) {
		t.Errorf("%q, %v", lines, err)
	}
	if lines, err := read(1); err != nil || !slices.Equal(lines, agent.lines[2:]) {
		t.Errorf("%q, %v", lines, err)
	}
	agent.err = status.Error(codes.NotFound, "no such session here")
	_, err = read(0)
	wantErr(t, "not started", err, codes.FailedPrecondition, "SESSION_NOT_STARTED")
	agent.err = status.Error(codes.Unavailable, "link down")
	_, err = read(0)
	wantErr(t, "link down", err, codes.Unavailable, "NODE_UNREACHABLE")
	f.edit(t, "a", func(s *fleet.Session) { s.Assignment.Node = "n2" })
	_, err = read(0)
	wantErr(t, "no link", err, codes.Unavailable, "UNAVAILABLE")
}

func TestErrorClasses(t *testing.T) {
	for _, c := range classes {
		err := Status(t.Context(), nil, errors.Join(errors.New("outer"), c.err))
		wantErr(t, c.reason, err, c.code, c.reason)
	}
}

// someEvents yields three events, or an error.
type someEvents struct{ err error }

func (e someEvents) Subscribe(_ context.Context, id, after string) iter.Seq2[*cloudcodev1.SessionEvent, error] {
	return func(yield func(*cloudcodev1.SessionEvent, error) bool) {
		for i := range 3 {
			if !yield(&cloudcodev1.SessionEvent{Id: fmt.Sprintf("%s-%s-%d", id, after, i)}, nil) {
				return
			}
		}
		if e.err != nil {
			yield(nil, e.err)
		}
	}
}

func TestWatchEvents(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Events = someEvents{fmt.Errorf("%w: bad id", fleet.ErrInvalidArgument)} })
	f.create(t, "a", nil)
	stream, err := f.WatchSessionEvents(t.Context(), &cloudcodev1.WatchSessionEventsRequest{Name: "sessions/a", After: "7"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		e, err := stream.Recv()
		if err != nil || e.GetId() != fmt.Sprintf("a-7-%d", i) {
			t.Errorf("event %d: %v, %v", i, e, err)
		}
	}
	_, err = stream.Recv()
	wantErr(t, "after", err, codes.InvalidArgument, "INVALID_ARGUMENT")
	stream, _ = f.WatchSessionEvents(t.Context(), &cloudcodev1.WatchSessionEventsRequest{Name: "sessions/b"})
	_, err = stream.Recv()
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")
}

// fakeAgent is a node daemon that has logs, or an error.
type fakeAgent struct {
	nodev1.AgentServiceClient
	lines []string
	err   error
}

func (a *fakeAgent) Agent(_ context.Context, node string) (nodev1.AgentServiceClient, error) {
	if node != "n1" {
		return nil, fmt.Errorf("%w: %s", fleet.ErrUnavailable, node)
	}
	return a, nil
}

func (a *fakeAgent) ReadLogs(ctx context.Context, req *nodev1.ReadLogsRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[nodev1.ReadLogsResponse], error) {
	lines := a.lines
	if n := int(req.GetTailLines()); n > 0 {
		lines = lines[len(lines)-n:]
	}
	return &fakeLogs{lines: lines, err: a.err}, nil
}

type fakeLogs struct {
	grpc.ServerStreamingClient[nodev1.ReadLogsResponse]
	lines []string
	err   error
}

func (l *fakeLogs) Recv() (*nodev1.ReadLogsResponse, error) {
	if len(l.lines) == 0 {
		return nil, l.err
	}
	line := l.lines[0]
	l.lines = l.lines[1:]
	return &nodev1.ReadLogsResponse{Entries: []*cloudcodev1.LogEntry{{Line: line}}}, nil
}
