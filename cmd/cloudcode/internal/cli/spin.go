package cli

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spf13/cobra"
)

// spin shows that something goes on until stop is called: on a terminal a line
// with how long it takes, elsewhere one line, and nothing where a program reads.
// stop may be called again.
func spin(cmd *cobra.Command, text string) (stop func()) {
	w := cmd.ErrOrStderr()
	scr := screenOf(w)
	if scr == nil {
		if outputOf(cmd) == formatTable {
			fmt.Fprintln(w, text)
		}
		return func() {}
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		spinUntil(w, scr, text, done)
	}()
	return sync.OnceFunc(func() { close(done); <-ended })
}

func spinUntil(w io.Writer, scr screen, text string, done <-chan struct{}) {
	v := &startView{w: w, scr: scr, style: styleOf(w), now: time.Now, current: step{phase: text, text: text}, since: time.Now()}
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	defer v.clear()
	for {
		v.tick()
		select {
		case <-ticker.C:
		case <-done:
			return
		}
	}
}
