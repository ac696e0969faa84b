package opencode

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

func frames(t *testing.T, r io.Reader) (got []string, err error) {
	t.Helper()
	err = readFrames(r, func(data []byte) { got = append(got, string(data)) })
	return got, err
}

func TestReadFrames(t *testing.T) {
	stream := ": hello\n\ndata: {\"a\":1}\n\ndata:{\"b\":2}\r\n\r\nevent: x\nid: 3\ndata: two\ndata: lines\n\ndata: unfinished"
	want := []string{`{"a":1}`, `{"b":2}`, "two\nlines"}
	for name, r := range map[string]io.Reader{
		"whole":       strings.NewReader(stream),
		"byte a time": iotest.OneByteReader(strings.NewReader(stream)),
	} {
		got, err := frames(t, r)
		if !slices.Equal(got, want) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestReadFramesBound(t *testing.T) {
	huge := io.MultiReader(strings.NewReader("data: "), bytes.NewReader(bytes.Repeat([]byte("x"), maxFrame+1)))
	if got, err := frames(t, huge); err == nil || errors.Is(err, io.ErrUnexpectedEOF) || len(got) != 0 {
		t.Errorf("an endless line: %d frames, %v", len(got), err)
	}
	many := bytes.Repeat([]byte("data: "+strings.Repeat("x", 1<<20)+"\n"), 9)
	if got, err := frames(t, bytes.NewReader(many)); err == nil || errors.Is(err, io.ErrUnexpectedEOF) || len(got) != 0 {
		t.Errorf("an endless event: %d frames, %v", len(got), err)
	}
}

func TestParse(t *testing.T) {
	e := parse([]byte(`{"directory":"/d","project":"p","payload":{"type":"message.updated","properties":{}}}`))
	if e.Type != "message.updated" || e.Directory != "/d" {
		t.Errorf("parsed %+v", e)
	}
	if e := parse([]byte("no JSON")); e.Type != "" || string(e.Frame) != "no JSON" {
		t.Errorf("parsed %+v", e)
	}
}

func FuzzReadFrames(f *testing.F) {
	f.Add([]byte("data: {}\n\n"))
	f.Add([]byte("data\ndata:\n\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		_ = readFrames(bytes.NewReader(in), func(data []byte) {
			if data == nil {
				t.Fatal("a frame without data")
			}
			parse(data)
		})
	})
}

// TestForgedTypes: a program that took OpenCode's place cannot say what only the node
// daemon says, such as that all is saved.
func TestForgedTypes(t *testing.T) {
	frame := []byte(`{"directory":"/d","payload":{"type":"cloudcode.checkpointed"}}`)
	if e := parse(frame); e.Type != "" || e.Directory != "/d" || string(e.Frame) != string(frame) {
		t.Errorf("passed on as %+v", e)
	}
}

func TestChatStatus(t *testing.T) {
	for _, c := range []struct {
		kind, frame string
		chat        string
		busy, ok    bool
	}{
		{"session.status", `{"payload":{"properties":{"sessionID":"ses_1","status":{"type":"busy"}}}}`, "ses_1", true, true},
		{"session.status", `{"payload":{"properties":{"sessionID":"ses_1","status":{"type":"retry","attempt":2}}}}`, "ses_1", true, true},
		{"session.status", `{"payload":{"properties":{"sessionID":"ses_1","status":{"type":"idle"}}}}`, "ses_1", false, true},
		{"session.idle", `{"payload":{"properties":{"sessionID":"ses_1"}}}`, "ses_1", false, true},
		{"session.updated", `{"payload":{"properties":{"sessionID":"ses_1"}}}`, "", false, false},
		{"session.status", `{"payload":{"properties":{}}}`, "", false, false},
		{"session.status", `no JSON`, "", false, false},
	} {
		chat, busy, ok := ChatStatus(Event{Type: c.kind, Frame: []byte(c.frame)})
		if chat != c.chat || busy != c.busy || ok != c.ok {
			t.Errorf("%s %s: %q %v %v", c.kind, c.frame, chat, busy, ok)
		}
	}
}
