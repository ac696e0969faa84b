package link

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/grpc"

	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
)

// early is a node's stream that has data on the way already.
type early struct {
	grpc.BidiStreamingServer[linkv1.ConnectRequest, linkv1.ConnectResponse]
	ctx      context.Context
	requests chan *linkv1.ConnectRequest
	taken    chan struct{} // closed once all requests are read
}

func (e *early) Context() context.Context { return e.ctx }

func (e *early) Recv() (*linkv1.ConnectRequest, error) {
	select {
	case r := <-e.requests:
		if len(e.requests) == 0 {
			close(e.taken)
		}
		return r, nil
	case <-e.ctx.Done():
		return nil, e.ctx.Err()
	}
}

// A dial that ends after the hub has matched it, before it is answered, leaves a
// connection that belongs to nobody.
func TestConnectionThatComesTooLate(t *testing.T) { // goleak sees what stays
	hub := NewHub(func(context.Context) (string, error) { return "n1", nil }, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	s := &early{ctx: ctx, requests: make(chan *linkv1.ConnectRequest, 2), taken: make(chan struct{})}
	s.requests <- &linkv1.ConnectRequest{Frame: &linkv1.ConnectRequest_ConnectionId{ConnectionId: "c"}}
	s.requests <- &linkv1.ConnectRequest{Frame: &linkv1.ConnectRequest_Data{Data: []byte("hello")}}
	hub.pending["c"] = &pendingDial{control: &control{node: "n1"}, answer: make(chan dialAnswer, 1), abandoned: true}
	if err := hub.Connect(s); err == nil {
		t.Error("a connection that nobody waits for was taken")
	}
	select {
	case <-s.taken:
	case <-time.After(5 * time.Second):
		t.Error("the data was not read within 5 s")
	}
	cancel() // as gRPC does when the handler has returned
}
