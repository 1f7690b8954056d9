// The sliders of galleries: each position has a picture of every place in every column.
"use strict";
for (const gallery of document.querySelectorAll(".gallery")) {
  const { labels, columns } = JSON.parse(gallery.querySelector("script").textContent);
  const slider = gallery.querySelector("input");
  const label = gallery.querySelector("output");
  const images = gallery.querySelectorAll("img[data-column]");
  const show = () => {
    const position = Number(slider.value);
    label.textContent = labels[position];
    slider.setAttribute("aria-valuetext", labels[position]);
    for (const image of images) {
      const { frames, at } = columns[image.dataset.column];
      image.src = "data:image/webp;base64," + frames[at[position]][image.dataset.place];
      image.alt = `${image.dataset.what}, ${labels[position]}`;
    }
  };
  slider.addEventListener("input", show);
  gallery.querySelector(".slider").hidden = false;
  show(); // a browser may have kept the position of an earlier visit
}
